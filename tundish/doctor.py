"""Which containers can be exported and verified here."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporters.base import Exporter, Target
from exporters.registry import EXPORTERS
from tundish.child import exit_with_parent, run_child
from tundish.worker import package_versions


@dataclass(frozen=True, slots=True)
class Examination:
    """One container: whether it can be exported, whether its runtime starts, and on what it computes."""

    target: str
    exports: bool
    verifies: bool
    versions: dict[str, str]
    devices: list[str]
    mend: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Examination]:
    """Look at every container; each runtime is started in a process of its own."""
    return [_examine(exporter) for exporter in EXPORTERS.values()]


def _examine(exporter: Exporter) -> Examination:
    modules = (*exporter.requires, *exporter.runtime_requires)
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    exports = not any(name in missing for name in exporter.requires)
    versions = package_versions(tuple(name for name in modules if name not in missing))
    mend = f"pip install 'tundish[{exporter.extra}]'" if missing else ""
    devices: list[str] = []
    if not missing:
        with tempfile.TemporaryDirectory(prefix="tundish-doctor-") as folder:
            result = Path(folder) / "devices.json"
            failure = run_child(
                "tundish.doctor", [exporter.target, str(result)], Path(folder) / "log.txt", 120, threads=1
            ).failure
            if failure:
                mend = f"the runtime {failure}"
            else:
                devices = json.loads(result.read_text(encoding="utf-8"))
    return Examination(exporter.target, exports, not mend, versions, devices, mend)


if __name__ == "__main__":
    exit_with_parent()
    Path(sys.argv[2]).write_text(json.dumps(EXPORTERS[Target(sys.argv[1])].devices()), encoding="utf-8")
