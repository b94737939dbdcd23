"""Puts a finished folder under its final name, and never harms what stood there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.errors import UsageError
from exporters.base import Target
from tundish.disk import disk_errors
from tundish.manifest_file import MANIFEST, REPORT, read_manifest


def require_replaceable(out: Path, targets: Iterable[Target]) -> None:
    """UsageError unless `out` is absent, empty, or a build of these targets or fewer that nobody added to."""
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise UsageError("--out is not a folder", where=str(out), mend="Choose another name.")
    if out.is_mount():
        raise UsageError(
            "--out is a mount point, which no rename can replace", where=str(out), mend="Choose a folder in it."
        )
    present = files_in(out)
    if not present:
        return
    if MANIFEST not in present:
        raise UsageError(
            "--out holds files that tundish did not write", where=str(out), mend="Choose another folder, or empty it."
        )
    lost = sorted({name.split("/", 1)[0] for name in _written(out / MANIFEST)} - set(targets))
    if lost:
        raise UsageError(
            f"--out holds artifacts that this build would remove: {', '.join(lost)}",
            where=str(out),
            mend="Build all targets of the recipe, or choose another --out.",
        )
    foreign = sorted(present - _written(out / MANIFEST) - {MANIFEST, REPORT})
    if foreign:
        raise UsageError(
            "--out holds files beside the artifacts, and a new build would replace the folder",
            where=str(out),
            found=", ".join(foreign[:5]) + (" …" if len(foreign) > 5 else ""),
            mend="Move them away, or choose another --out.",
        )


def files_in(folder: Path) -> set[str]:
    """Relative names of everything below a folder that is no folder itself; links are not followed."""
    try:
        return {
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
        }
    except OSError as error:
        raise UsageError(
            "cannot look into the folder", where=str(folder), found=str(error), mend="Choose another."
        ) from error


def _written(manifest: Path) -> set[str]:
    targets = read_manifest(manifest.parent)["targets"]
    return {f"{target}/{name}" for target, entry in targets.items() for name in entry["files"]}


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
