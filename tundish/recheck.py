"""Verifies a build again, whenever that is: its files, its signature, and every gate anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from converters.errors import GateError, UsageError
from converters.source import (
    Source,
    Stamp,
    blaming_changes,
    require_unchanged,
    resolve_source,
    source_digest,
    source_stamp,
)
from exporters.base import Target
from exporters.registry import EXPORTERS
from tundish.expectations import NOTHING, require_expected, told
from tundish.gates import FailedGatesError, failed_gates, record_results
from tundish.integrity import Intact, Signature, holding_intact
from tundish.manifest import verification_record
from tundish.manifest_file import SIGNATURE
from tundish.model import SAMPLE, find_source, open_model
from tundish.processors import cores
from tundish.recipe import Recipe, recipe_digest
from tundish.scratch import temporary_folder
from tundish.settle import with_recorded_schemes
from tundish.verify import verify
from tundish.watcher import Watcher
from tundish.whereabouts import recall


def verify_again(
    folder: Path,
    model: str | None,
    threads: int | None,
    watcher: Watcher,
    key: Path | None = None,
    expected: Mapping[str, str] = NOTHING,
) -> dict[str, Any]:
    """Check a published folder: its files' digests, the signature if there is a public key in the file `key`,
    whether it is the build that is `expected`, then every gate anew.

    Updates its manifest, report and cards, unless it is signed: what somebody put a name to stays as it is.
    """
    count = threads or cores()
    with holding_intact(folder, count, watcher.say, key) as intact:
        watcher.say(told(intact))
        require_expected(folder, intact.manifest, expected)
        return _verify_again(folder, intact, model, count, watcher)


def _verify_again(folder: Path, intact: Intact, model: str | None, count: int, watcher: Watcher) -> dict[str, Any]:
    manifest = intact.manifest
    recipe = recorded_recipe(manifest, folder)
    source, stamp = recorded_source(manifest["source"], model, count)
    digests = {name: entry["digest"] for name, entry in manifest["weights"].items() if "digest" in entry}
    with blaming_changes(source.folder, stamp):
        opened = with_recorded_schemes(open_model(source, recipe), recipe, manifest)
        with temporary_folder() as scratch:
            results = verify(opened, source, recipe, EXPORTERS, folder, digests, scratch, count, watcher.say)
    require_unchanged(source.folder, stamp)
    # Asked again: that took minutes, and where there are no locks, somebody may have signed meanwhile.
    if intact.signature is Signature.NONE and not (folder / SIGNATURE).exists():
        record_results(manifest, results, folder, folder)
    else:
        manifest["verification"] = verification_record(results)
        watcher.say("the folder is signed: its manifest and report stay as they are")
    failures = failed_gates(results)
    if failures:
        raise FailedGatesError(manifest, "verification failed", where=str(folder), found="; ".join(failures))
    return manifest


def recorded_recipe(manifest: dict[str, Any], folder: Path) -> Recipe:
    """The recipe in the manifest, as it was when the artifacts were built."""
    try:
        recipe = Recipe.model_validate(manifest["recipe"])
    except ValidationError as error:
        raise UsageError("the manifest's recipe is damaged", where=str(folder), found=str(error.errors()[0])) from error
    if recipe_digest(recipe) != manifest["recipe_digest"] or {*recipe.targets} != {*map(Target, manifest["targets"])}:
        raise GateError(
            "the manifest's recipe was changed after the build",
            where=str(folder),
            mend="Build again with the recipe you want.",
        )
    return recipe


def recorded_source(record: dict[str, Any], model: str | None, threads: int) -> tuple[Source, Stamp]:
    """The checkpoint of the manifest, or --model; its files must be the recorded ones. And its stamp before.

    UsageError if it is a local one and no build remembers where it was.
    """
    if model is not None:
        source = find_source(model, None)
    elif record["repo_id"]:
        source = resolve_source(record["repo_id"], record["revision"])
    else:
        source = find_source(str(recall(record["files"]) or _only_sample(record["name"])), None)
    stamp = source_stamp(source.folder)
    found = source_digest(source.folder, threads)
    differing = sorted(name for name in {**record["files"], **found} if found.get(name) != record["files"].get(name))
    if differing:
        raise UsageError(
            "this is not the checkpoint that the artifacts were made from",
            where=str(source.folder),
            found=f"other contents in {', '.join(differing[:4])}",
            mend="Give the checkpoint with --model.",
        )
    return source, stamp


def _only_sample(name: str) -> str:
    if name != SAMPLE:
        raise UsageError(
            "the checkpoint that the artifacts were made from is not where it was",
            where=name,
            mend="Give it with --model.",
        )
    return SAMPLE
