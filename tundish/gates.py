"""What a verification came to: written down, and an end to the build that missed a gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converters.errors import GateError
from tundish.disk import IN_PLACE, disk_errors
from tundish.manifest import verification_record
from tundish.papers import write_papers
from tundish.publish import reject
from tundish.results import Gate, TargetResult
from tundish.signals import deferred_signals
from tundish.signing import Signer


class FailedGatesError(GateError):
    """Gates that were missed; `manifest` has every figure."""

    def __init__(self, manifest: dict[str, Any], what: str, **parts: str) -> None:
        super().__init__(what, **parts)
        self.manifest = manifest


def require_gates(manifest: dict[str, Any], results: Sequence[TargetResult] | None, folder: Path, out: Path) -> None:
    """GateError if a gate failed, after moving the folder to `<out>.rejected`."""
    failures = failed_gates(results or ())
    if not failures:
        return
    rejected = reject(folder, rejected_name(out))
    raise FailedGatesError(
        manifest,
        "verification failed, nothing is published",
        found="; ".join(failures),
        mend=f"The artifacts and their report are in {rejected} for a look.",
    )


def rejected_name(out: Path) -> Path:
    """Where a build of `out` goes that missed a gate."""
    return out.with_name(out.name + ".rejected")


def failed_gates(results: Sequence[TargetResult]) -> list[str]:
    """A phrase for every gate that failed."""
    return [
        f"{result.target} {gate.name}: {_why(gate)}"
        for result in results
        for gate in result.gates
        if gate.passed is False
    ]


def _why(gate: Gate) -> str:
    if gate.figure is None or not gate.threshold:
        return gate.detail
    return f"{gate.figure:.4g} against {gate.threshold:g}"


def record_results(
    manifest: dict[str, Any],
    results: Sequence[TargetResult] | None,
    folder: Path,
    out: Path,
    signer: Signer | None = None,
) -> None:
    """Write the manifest, with what verification found, and what goes with it. What missed a gate is not signed."""
    if results is not None:
        manifest["verification"] = verification_record(results)
    with disk_errors(out, IN_PLACE if folder == out else None), deferred_signals():
        write_papers(folder, manifest, None if failed_gates(results or ()) else signer)
