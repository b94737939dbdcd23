"""What a build may take over from one that was killed: by what key it is the same, and which results still hold."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from converters.file_digest import sha256_of
from converters.source import Source
from exporters.base import Exporter, Layout, Model, Target
from tundish.cache import INDEX, Json, canonical, read_index
from tundish.calibrate import Calibrated
from tundish.disk import disk_errors
from tundish.divergence import Divergence
from tundish.journal import Journal, has_journal, read_journal
from tundish.pour import Poured
from tundish.publish import discard, staging
from tundish.recipe import Recipe
from tundish.results import Gate, TargetResult
from tundish.worker import package_versions

_LIBRARIES = ("tundish", "numpy", "numba", "gguf", "tokenizers")  # that bytes depend on


def content_key(
    source: Source,
    files: Mapping[str, str],
    model: Model,
    recipe: Recipe,
    layouts: Mapping[Target, Layout],
    calibration: str,
) -> str:
    """SHA-256, in hex, of all that decides what a build writes. files: SHA-256 of the source's files, by name.

    `calibration`: calibration_digest of what was found out before the pour.
    """
    return canonical(
        {
            "libraries": {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
            "source": [source.name, source.repo_id, source.revision, dict(files)],
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "weights": {name: [list(each.shape), each.scheme.name] for name, each in model.graph.weights.items()},
            "layouts": {target: _layout_digest(layout) for target, layout in layouts.items()},
            "calibration": calibration,
        }
    )


def _layout_digest(layout: Layout) -> str:
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update(repr(parts).encode())

    for name, big in layout.big.items():
        add(name, big.nbytes)
        for offset, data in big.fixed:
            add(offset, hashlib.sha256(data).hexdigest())
    for name, data in layout.small.items():
        add(name, hashlib.sha256(data).hexdigest())
    for weight, places in layout.places.items():
        add(weight, [(place.file, place.offset, place.row_nbytes, place.row_multiple) for place in places])
    return digest.hexdigest()


def calibration_digest(calibrated: Calibrated, threads: int) -> str:
    """SHA-256, in hex, of what a calibration came to. Two that found other codes have other digests."""
    arrays = {"importance": calibrated.importance, "scales": calibrated.scales}
    return canonical(
        {kind: {name: _sha256(np.ascontiguousarray(values).data) for name, values in each.items()}
         for kind, each in arrays.items()}
        | {"record": dict(calibrated.record or {}), "codes": _codes(calibrated, threads)}
    )  # fmt: skip


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _codes(calibrated: Calibrated, threads: int) -> Json | None:
    """SHA-256 of the files with the codes, which the cache knows of those that it keeps."""
    if calibrated.codes is None:
        return None
    index = read_index(calibrated.codes.folder)
    if index is not None:
        return {name: file["sha256"] for name, file in index["files"].items()}
    paths = [path for path in calibrated.codes.folder.iterdir() if path.name != INDEX]
    return {path.name: sha256 for path, sha256 in sha256_of(paths, threads).items()}


def verified_record(result: TargetResult, files: Mapping[str, Json]) -> Json:
    """What a journal keeps of a result, and what that holds for: the artifact's files, and the packages asked."""
    return {"result": asdict(result), "files": {name: file["sha256"] for name, file in files.items()}} | _reference()


def still_verified(
    journaled: Mapping[str, Json], artifacts: Mapping[str, Json], exporters: Mapping[Target, Exporter]
) -> dict[Target, TargetResult]:
    """The results of a journal that hold for these artifacts: the same bytes passed in the same versions of everything.

    artifacts: the manifest's targets.
    """
    results: dict[Target, TargetResult] = {}
    for name, record in journaled.items():
        try:
            target = Target(name)
            result = _result(record["result"])
            same = record == json.loads(json.dumps(verified_record(result, artifacts[target]["files"])))
        except (LookupError, TypeError, ValueError):  # no build wrote that: it is verified again
            continue
        if same and result.passed and result.versions == package_versions(exporters[target].runtime_requires):
            results[target] = result
    return results


def taken_over(poured: Poured, verified: Iterable[Target]) -> str:
    """What of this build a killed one had done, for people."""
    also = "".join(f", and that {target} was verified" for target in verified)
    return f"taken over from a build that was killed: {poured.kept} of {poured.blocks} blocks of rows, by digest{also}"


@contextmanager
def unfinished(
    out: Path,
    left: Path | None,
    content: Callable[[], str],
    known: Callable[[], bool],
    say: Callable[[str], None],
) -> Iterator[tuple[Path, Journal]]:
    """The folder to build `out` in, and its journal: what is `left` if it is of the same content, or a new one.

    `content` gives the key, for which it may wait unless it is `known`, which it is no more once the source changed:
    what was read from then on is not of that key. A signal that ends the body leaves the folder to the same command, if
    there is anything to take over; whatever else ends it has it removed.
    """
    found = None if left is None else read_journal(left)
    if left is not None and (found is None or found.key != content()):
        say(f"removed: {left}, of a build of something else that was killed")
        discard(left)
        left = found = None

    def worth_keeping(folder: Path) -> bool:
        kept = has_journal(folder)
        if kept:
            say(f"kept: {folder}; the same command goes on from there, --fresh or another build removes it")
        return kept

    with staging(out, left=left, worth_keeping=worth_keeping) as folder:
        with disk_errors(out):
            journal = Journal(folder, lambda: content() if known() else None, found)
        try:
            yield folder, journal
        finally:
            journal.close()


def _reference() -> Json:
    """Versions of what artifacts are compared with beside tundish, whose own is in the build's key."""
    return {"reference": {name: _version(name) for name in ("transformers", "sentencepiece", "protobuf")}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _result(record: Json) -> TargetResult:
    divergence = record["divergence"]
    return TargetResult(
        Target(record["target"]),
        tuple(Gate(**gate) for gate in record["gates"]),
        record["versions"],
        None if divergence is None else Divergence(**divergence),
        record["answer"],
    )


def bytes_in(folder: Path | None) -> int:
    """What an unfinished folder has of the disk already: its files' space is reserved when they are made."""
    if folder is None:
        return 0
    return sum(path.lstat().st_blocks * 512 for path in _files(folder))


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
