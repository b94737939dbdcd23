"""Puts a finished folder under its final name, and never harms what stood there."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.errors import UsageError
from tundish.pour import disk_errors

MANIFEST = "manifest.json"
REPORT = "report.md"


def require_replaceable(out: Path) -> None:
    """UsageError unless `out` is absent, empty, or a folder that tundish wrote and nobody added to."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise UsageError("--out is not a folder", where=str(out), mend="Choose another name.")
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if not present:
        return
    if MANIFEST not in present:
        raise UsageError(
            "--out holds files that tundish did not write", where=str(out), mend="Choose another folder, or empty it."
        )
    foreign = sorted(present - _written(out / MANIFEST) - {MANIFEST, REPORT})
    if foreign:
        raise UsageError(
            "--out holds files beside the artifacts, and a new build would replace the folder",
            where=str(out),
            found=", ".join(foreign[:5]) + (" …" if len(foreign) > 5 else ""),
            mend="Move them away, or choose another --out.",
        )


def _written(manifest: Path) -> set[str]:
    try:
        targets = json.loads(manifest.read_text(encoding="utf-8"))["targets"]
        return {f"{target}/{name}" for target, entry in targets.items() for name in entry["files"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            "--out holds a manifest.json that is not tundish's", where=str(manifest), mend="Choose another folder."
        ) from error


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, on the same file system. It is removed at the end if it is still there."""
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        folder.chmod(0o755)  # mkdtemp's 0700 would stay with the published folder
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`. An earlier `out` is moved aside first and put back if the rename fails."""
    with disk_errors(out):
        if not out.exists():
            folder.rename(out)
            return
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".old", dir=out.parent) as aside:
            old = Path(aside) / out.name
            out.rename(old)
            try:
                folder.rename(out)
            except BaseException:
                old.rename(out)
                raise
