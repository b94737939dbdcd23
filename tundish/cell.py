"""The child process of `tundish matrix`: surveys a model, takes its digests, or builds one cell.

    python -m tundish.cell REQUEST.json

Standard output has events, a JSON line each; the last one is `result`, or `failed` with the exit status. Whatever
native libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.errors import GateError, TundishError
from converters.file_digest import sha256_of
from converters.source import Source, SourceDigests, require_unchanged, source_digest, source_stamp
from exporters.registry import EXPORTERS
from tundish.cache import canonical
from tundish.calibrate import CalibrationText, calibration_text
from tundish.calibration_cache import is_kept, key_of
from tundish.calibration_text import digest
from tundish.child import exit_with_parent
from tundish.events import Event, Events, watching
from tundish.gates import FailedGatesError
from tundish.integrity import require_intact
from tundish.job import Choices, build, output, settle_recipe
from tundish.letters import use_plain_letters
from tundish.manifest import portable_recipe
from tundish.manifest_file import MANIFEST, read_manifest
from tundish.model import find_source, open_model
from tundish.plan import Plan, make_plan
from tundish.recipe import CalibrationSource, Recipe, recipe_digest
from tundish.recipe_errors import MisfitError
from tundish.signals import unwind_at_signals
from tundish.user_path import expanded
from tundish.verify import missing_runtime
from tundish.watcher import SILENT

RUNTIME_BYTES = 512 << 20  # of a runtime that verifies, its artifact aside, about

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What the child is asked: `task` `survey` takes the model's digests and says how each cell stands; `build` builds
    the one cell. `recipes` are files, `outs` the folder of each; `known`: digests as as_json gives them."""

    task: str
    model: str
    revision: str | None
    recipes: list[str]
    outs: list[str]
    threads: int
    fresh: bool
    known: Json | None

    def choices(self, index: int) -> Choices:
        """Of one of the recipes."""
        return Choices(
            self.recipes[index],
            self.model,
            Path(self.outs[index]),
            threads=self.threads,
            fresh=self.fresh,
            revision=self.revision,
            known=None if self.known is None else from_json(self.known),
        )


def run(request: Request, events: Events) -> Json:
    """Do what is asked, and return what `result` says."""
    if request.task == "build":
        try:
            manifest = build(request.choices(0), watching(events, SILENT))
        except FailedGatesError as error:
            events.gates(error.manifest)
            raise
        except MisfitError as error:  # at a line of a copy that goes with this process; a survey tells the key, too
            raise error.at(None) from error.__cause__
        events.gates(manifest)
        return {"manifest": manifest}
    source = find_source(request.model, request.revision)
    digests = _digests(request, source, events)
    choices = [request.choices(index) for index in range(len(request.recipes))]
    return {"digests": as_json(digests), "cells": [_survey(each, source, digests, events) for each in choices]}


def _digests(request: Request, source: Source, events: Events) -> SourceDigests:
    """The model's digests: those known if its files are as they were, else what is read now."""
    stamp = source_stamp(source.folder)
    known = None if request.known is None else from_json(request.known)
    if known is not None and known.stamp == stamp:
        return known
    events.emit("source", folder=str(source.folder), bytes=sum(size for size, *_ in stamp.values()))
    digests = SourceDigests(stamp, source_digest(source.folder, request.threads))
    require_unchanged(source.folder, stamp)
    return digests


def as_json(digests: SourceDigests) -> Json:
    """Digests as they travel between processes."""
    return {"stamp": dict(digests.stamp), "sha256": dict(digests.sha256)}


def from_json(document: Json) -> SourceDigests:
    """What as_json was given."""
    stamp = {
        name: (nbytes, written, file, changed) for name, (nbytes, written, file, changed) in document["stamp"].items()
    }
    return SourceDigests(stamp, document["sha256"])


def _survey(choices: Choices, source: Source, digests: SourceDigests, events: Events) -> Json:
    """A cell as it stands: `manifest` if it is built already, else what its build needs, and `why` there is to be one;
    or why it cannot be built.

    `calibration` is the same for cells that need the same one, which is not there yet.
    """
    try:
        recipe = settle_recipe(choices)
        model = open_model(source, recipe)
        text = calibration_text(model, recipe)
        built = "--fresh" if choices.fresh else _built(choices, recipe, digests, text, events)
        if not isinstance(built, str):
            return {"manifest": built}
        plan = make_plan(model, recipe, EXPORTERS, choices.threads or 1)
    except TundishError as error:
        return {"status": error.exit_status, "message": str(error)}
    group = None
    if text is not None:
        key = key_of(model, recipe, text, digests.sha256)
        if recipe.budget is not None:  # its schemes are settled in the build, from the targets among other things
            settled = {"budget": recipe.budget.model_dump(mode="json"), "targets": sorted(recipe.targets)}
            group = canonical(key.parts | settled)
        elif choices.fresh or not is_kept(key):
            group = canonical(key.parts)
        else:
            plan = plan.with_cached_calibration()
    return {"memory": plan.memory + _runtime_bytes(plan, recipe), "calibration": group, "why": built}


def _runtime_bytes(plan: Plan, recipe: Recipe) -> int:
    """What a runtime holds while it verifies the largest artifact, about; nothing if none does."""
    largest = max(layout.nbytes for layout in plan.layouts.values())
    return RUNTIME_BYTES + largest if recipe.verify.enabled else 0


def _built(
    choices: Choices, recipe: Recipe, digests: SourceDigests, text: CalibrationText | None, events: Events
) -> Json | str:
    """The manifest of an undamaged build of this source, recipe and calibration by this version, which is verified as
    far as it would be now; or what there is instead."""
    out = output(choices, recipe)
    if not (out / MANIFEST).is_file():
        return "no build there"
    manifest = read_manifest(out)
    differing = _differing(manifest, recipe, digests, text)
    if differing is not None:
        return f"the build there {differing}"
    try:
        return require_intact(out, choices.threads or 1).manifest
    except GateError as error:
        events.emit("message", message=f"built anew: {error}")
        return f"the build there is damaged: {error}"


def _differing(manifest: Json, recipe: Recipe, digests: SourceDigests, text: CalibrationText | None) -> str | None:
    """In what a build is not what is asked for."""
    if manifest["tundish"] != version("tundish"):
        return f"is by tundish {manifest['tundish']}"
    if manifest["recipe_digest"] != recipe_digest(portable_recipe(recipe)):
        return "is of another recipe"
    files = manifest["source"]["files"]
    if files != digests.sha256:
        names = sorted(name for name in {*files, *digests.sha256} if files.get(name) != digests.sha256.get(name))
        return f"is of other files: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if not _is_verified(manifest, recipe):
        return "is not verified as the recipe asks"
    if not _is_calibration(manifest["calibration"] or {}, recipe, text):
        return "was calibrated with another text or file"
    return None


def _is_verified(manifest: Json, recipe: Recipe) -> bool:
    """Whether every target was verified that the recipe wants verified, and none failed. One for which there was no
    runtime counts while there is none: a new build could not verify it either."""
    results = manifest["verification"] or {}
    if not recipe.verify.enabled:
        return all(result["passed"] is not False for result in results.values())
    found = {target: results.get(target, {"passed": False})["passed"] for target in recipe.targets}
    return all(passed or (passed is None and missing_runtime(EXPORTERS[target])) for target, passed in found.items())


def _is_calibration(record: Json, recipe: Recipe, text: CalibrationText | None) -> bool:
    """Whether a file or text that is no part of recipe and source is still what was read."""
    if recipe.calibration.source is CalibrationSource.IMATRIX:
        path = expanded(recipe.calibration.file or "")
        return path.is_file() and record.get("sha256") == sha256_of([path])[path]
    return text is None or text.token_ids is None or record.get("token_ids_sha256") == digest(text.token_ids)


def main() -> None:
    """Runs the request in the file given."""
    exit_with_parent()
    unwind_at_signals()
    use_plain_letters()
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # native libraries print to descriptor 1

    def take(event: Event) -> None:
        lines.write(json.dumps(event) + "\n")

    events = Events(take)
    try:
        result = run(Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), events)
    except TundishError as error:
        manifest = error.manifest if isinstance(error, FailedGatesError) else None
        events.emit("failed", status=error.exit_status, message=str(error), manifest=manifest)
        sys.exit(error.exit_status)
    events.emit("result", **result)


if __name__ == "__main__":
    main()
