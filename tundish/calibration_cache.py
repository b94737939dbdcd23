"""Calibrations on text are kept in the cache, so that another recipe of the same model need not wait for them again.

An entry is a folder named by what it was made from: the SHA-256 of its key. In it are the fitted matrices
(converters.quantize.codes), importances and scales as .npz, and an index with the SHA-256 of each file. It gets its
name when it is whole; a build pours straight from it. Until then it is a folder beside that, in which a build goes on
that is the next after one that was killed (tundish.calibration_progress).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from converters.arrays import products
from converters.errors import ModelError
from converters.file_digest import sha256_of
from converters.graph import Graph
from converters.quantize.codes import CodeStore
from exporters.base import Model
from tundish.cache import (
    INDEX,
    Json,
    cache_disk,
    cache_folder,
    calibration_folders,
    calibrations,
    canonical,
    found,
    held,
    put,
    read_index,
    reclaim_entries,
    remove,
    unfinished,
    write_index,
)
from tundish.calibrate import CalibrationText, Find, Findings, Keep, title_of
from tundish.calibration_progress import IMPORTANCE, SCALES, Workplace, load_arrays, save_arrays
from tundish.calibration_text import digest
from tundish.disk import cache_errors, disk_errors
from tundish.publish import is_plain, remove_any, staging
from tundish.recipe import Recipe

CALIBRATION_VERSION = 3  # to be raised whenever the same key comes to other findings


@dataclass(frozen=True, slots=True)
class Key:
    """What a calibration depends on, as JSON, and what people call the model and the text."""

    parts: Json
    model: str
    text: str

    @property
    def folder(self) -> Path:
        """Where it is kept, if it is."""
        return calibrations() / canonical(self.parts)


@dataclass(frozen=True, slots=True)
class Keeper:
    """`found`: what was kept from an earlier time; `keep` gives that, or finds it and keeps it."""

    found: Findings | None
    keep: Keep


def key_of(model: Model, recipe: Recipe, text: CalibrationText, checkpoint: Mapping[str, str]) -> Key:
    """The key of a calibration that this thread would make. checkpoint: SHA-256 of each of source_files, by name."""
    calibration = recipe.calibration
    if text.token_ids is None:  # what the model will write is known by what it depends on
        read: Json = {"seed": calibration.seed, "chat": calibration.chat}
    else:
        read = {"token_ids_sha256": digest(text.token_ids)}
    read |= {"sequences": calibration.sequences, "length": calibration.length}
    parts = _settings(model.graph, recipe) | {"text": read, "checkpoint": dict(checkpoint)}
    return Key(parts, model.name, title_of(text.origin))


def may_be_kept(graph: Graph, recipe: Recipe) -> bool:
    """Whether a calibration is kept that differs in no more than text and checkpoint, which take long to compare."""
    settings = _settings(graph, recipe).items()
    indexes = filter(None, map(read_index, calibration_folders()))
    return any(all(index["key"].get(name) == value for name, value in settings) for index in indexes)


def is_kept(key: Key) -> bool:
    """Whether the calibration is there; not whether its files are as they were."""
    return read_index(key.folder) is not None


@contextmanager
def keeping(key: Key | None, out: Path, fresh: bool, threads: int, say: Callable[[str], None]) -> Iterator[Keeper]:
    """Look for a calibration, unless it is to be `fresh`, and keep what is found instead. No key: there is none.

    Findings stay until the end. Where the cache cannot be written to, they are beside `out` until then. The keeper's
    ResourceError says that the cache's disk is full.
    """
    with ExitStack() as stack:
        kept = None if key is None or fresh else _kept(key, threads, stack, say)

        def keep(find: Find) -> Findings:
            assert key is not None
            if kept is None:
                return _made(key, find, out, fresh, threads, stack, say)
            say(f"calibration: cached ({key.folder.name[:12]} of `tundish cache ls`)")
            return kept

        yield Keeper(kept, keep)


def _settings(graph: Graph, recipe: Recipe) -> Json:
    """The parts of a key that are known at once."""
    return {
        "version": CALIBRATION_VERSION,
        "tundish": version("tundish"),
        "numpy": np.__version__,
        "computed_by": products().name,
        "method": recipe.settled_method.value,
        "long_factors": graph.config.rope.long,
        "schemes": {weight.name: weight.scheme.name for weight in graph.weights.values()},
    }


def _kept(key: Key, threads: int, stack: ExitStack, say: Callable[[str], None]) -> Findings | None:
    """What is in an entry, which `stack` then keeps from being removed; None if there is none or it is damaged."""
    folder = key.folder

    def damaged(index: Json) -> list[str]:
        asked = {"files", "bits", "token_ids_sha256"}
        return _damaged(folder, index["files"], threads) if asked <= index.keys() else [INDEX]

    index = stack.enter_context(found(folder, key.parts, damaged, say, "the calibration is made anew"))
    if index is None:
        return None
    codes = CodeStore(folder, index["bits"]) if index["bits"] is not None else None
    return Findings(index["token_ids_sha256"], load_arrays(folder / IMPORTANCE), load_arrays(folder / SCALES), codes)


def _damaged(folder: Path, files: Mapping[str, Json], threads: int) -> list[str]:
    """Names of files that are not what the index says, or that it does not know."""
    present = {path.name: path for path in folder.iterdir() if path.name != INDEX}
    wrong = {*files, *present} - {
        name for name, path in present.items() if name in files and path.stat().st_size == files[name]["bytes"]
    }
    if not wrong:
        try:
            found = sha256_of(present.values(), threads)
        except ModelError as error:  # the disk cannot read it any more
            return [error.where or str(folder)]
        wrong = {name for name, path in present.items() if found[path] != files[name]["sha256"]}
    return sorted(wrong)


def _made(
    key: Key, find: Find, out: Path, fresh: bool, threads: int, stack: ExitStack, say: Callable[[str], None]
) -> Findings:
    if cache_disk() is None:
        say(f"warning: {cache_folder()} cannot be written to, so that the calibration is not kept; see TUNDISH_CACHE")
        scratch = stack.enter_context(staging(out))
        with disk_errors(out):
            return find(Workplace(scratch))
    reclaim_entries(say)
    folder = key.folder
    with cache_errors(folder.parent):
        place, share = _workplace(key, fresh, threads, stack, say)
        findings = _found(place, find)
        _write(place, key, findings, threads)
        share()
        if not put(place.folder, folder, fresh):
            stack.callback(shutil.rmtree, place.folder, ignore_errors=True)
            return findings  # another build was faster, or uses what is there; ours are removed at the end
    return findings if findings.codes is None else replace(findings, codes=CodeStore(folder, findings.codes.bits))


def _workplace(
    key: Key, fresh: bool, threads: int, stack: ExitStack, say: Callable[[str], None]
) -> tuple[Workplace, Callable[[], None]]:
    """Where to make an entry, which nobody else uses as long as `stack` is open; and what lets others use it as well.

    It is where an earlier build was killed, if there is one. Where another build is at it now, or what has its name is
    no folder, it is a new one, of which nothing is kept before it is finished.
    """
    begun = unfinished(key.folder)
    if fresh:
        remove(begun)
    with suppress(FileExistsError):  # what is no folder is not held either
        begun.mkdir(parents=True)
    share = stack.enter_context(held(begun))
    if share is None:
        made = stack.enter_context(staging(key.folder, cache_errors)) / "entry"
        made.mkdir()
        held_open = stack.enter_context(held(made))
        return Workplace(made), held_open or (lambda: None)
    place = Workplace(begun, {"key": key.parts, "model": key.model, "text": key.text}, say)
    for path in begun.iterdir():
        if not is_plain(path):  # no build made that
            remove_any(path)
    index = read_index(begun)
    known = index["files"] if index is not None and index["key"] == key.parts and "reached" in index else {}
    for path in begun.iterdir():
        if path.name not in {*known, INDEX}:
            path.unlink()
    if index is None or not known:
        return place, share
    damaged = _damaged(begun, known, threads)
    if damaged:
        say(f"damaged: {', '.join(damaged[:5])} in {begun}; the calibration begins anew")
        for path in begun.iterdir():
            path.unlink()
    else:
        say(f"calibration: goes on where an earlier build ended ({begun.name[:12]} of `tundish cache ls`)")
        place.take_over(index)
    return place, share


def _found(place: Workplace, find: Find) -> Findings:
    """What a calibration finds in its place, which is left to the next build if something of it was kept."""
    try:
        return find(place)
    except BaseException:
        if not place.was_kept:
            shutil.rmtree(place.folder, ignore_errors=True)
        raise


def _write(place: Workplace, key: Key, findings: Findings, threads: int) -> None:
    """Make an entry of what is in its place. The index of what was unfinished holds until there is another."""
    folder, passing = place.folder, place.passing()
    save_arrays(folder / IMPORTANCE, findings.importance)
    if not (folder / SCALES).exists():
        save_arrays(folder / SCALES, findings.scales)
    paths = sorted({*folder.iterdir()} - {*passing, folder / INDEX})
    sha256 = sha256_of(paths, threads)
    content: Json = {
        "key": key.parts,
        "model": key.model,
        "text": key.text,
        "token_ids_sha256": findings.token_ids_sha256,
        "bits": findings.codes and findings.codes.bits,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256[path]} for path in paths},
    }
    write_index(folder, content)
    for path in passing:
        path.unlink(missing_ok=True)
