"""A build from end to end: plan, pour, verify, publish. And the same verification again, later."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from pathlib import Path
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, TypeVar

from pydantic import ValidationError

from converters.arrays import computing_by, products_on
from converters.errors import GateError, ResourceError, UsageError
from converters.source import (
    Source,
    SourceDigests,
    Stamp,
    blaming_changes,
    digesting_source,
    file_stamp,
    require_unchanged,
    resolve_source,
    source_digest,
    source_files,
    source_stamp,
)
from exporters.base import Target
from exporters.registry import EXPORTERS
from tundish.blas import fixed_blas
from tundish.cache import cache_disk, in_use
from tundish.calibrate import NOTHING, calibrate, calibration_text, check_calibration, is_calibrated, reading
from tundish.calibration_cache import is_kept, keeping, key_of, may_be_kept
from tundish.cost_cache import CostMemory
from tundish.disk import disk_errors, naming_need
from tundish.estimate import estimate_time
from tundish.holding import holding
from tundish.integrity import Signature, require_intact
from tundish.journal import has_journal
from tundish.manifest import build_manifest, verification_record
from tundish.manifest_file import write_manifest
from tundish.model import SAMPLE, find_source, open_model
from tundish.papers import write_licences, write_papers
from tundish.plan import Plan, disk_of, make_plan, shortage_of
from tundish.pour import pour
from tundish.publish import left_by_killed, publish, reject, require_replaceable, restore
from tundish.recipe import Recipe, line_of, load_recipe, recipe_digest
from tundish.recipe_errors import MisfitError
from tundish.resume import (
    bytes_in,
    calibration_digest,
    content_key,
    still_verified,
    taken_over,
    unfinished,
    verified_record,
)
from tundish.settle import settle_schemes, with_recorded_schemes
from tundish.signals import deferred_signals
from tundish.signing import Signer, load_signer
from tundish.source_card import licence_files
from tundish.verify import TargetResult, verify
from tundish.whereabouts import recall, remember

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Watcher:
    """How a job reports what it does: `say` a sentence, `start` a count of a total, `advance` it.

    `published` is called with the build's folder once that has its final name; no signal comes between.
    """

    say: Callable[[str], None]
    start: Callable[[str, int], None]
    advance: Callable[[int], None]
    published: Callable[[Path], None] = lambda out: None


SILENT = Watcher(lambda text: None, lambda text, total: None, lambda amount: None)


@dataclass(frozen=True, slots=True)
class Choices:
    """What the command line settles on top of the recipe. `threads` None: as many as cores; `fresh`: take nothing over
    from earlier builds, be it a calibration or what a killed one had done; `revision`: of the model; `known`: its
    digests, if they were taken already; `device`: of torch's, for the products of a calibration, None: numpy computes
    them; `sign_key`: a private key in a PEM file, see tundish.signing."""

    recipe: str
    model: str | None = None
    out: Path | None = None
    targets: Sequence[Target] = ()
    verify: bool = True
    threads: int | None = None
    fresh: bool = False
    revision: str | None = None
    known: SourceDigests | None = None
    device: str | None = None
    sign_key: Path | None = None


def telling_lines(work: Callable[Concatenate[Choices, P], T]) -> Callable[Concatenate[Choices, P], T]:
    """Work whose MisfitErrors name the line of the recipe."""

    @wraps(work)
    def told(choices: Choices, /, *arguments: P.args, **names: P.kwargs) -> T:
        try:
            return work(choices, *arguments, **names)
        except MisfitError as error:
            raise error.at(line_of(choices.recipe, error.key)) from error.__cause__

    return told


def settle_recipe(choices: Choices) -> Recipe:
    """The recipe with its targets narrowed to those chosen."""
    recipe = load_recipe(choices.recipe)
    unknown = [target for target in choices.targets if target not in recipe.targets]
    if unknown:
        raise UsageError(f"recipe {recipe.name} has no target {', '.join(unknown)}", expected=", ".join(recipe.targets))
    if not choices.targets:
        return recipe
    kept = {target: options for target, options in recipe.targets.items() if target in choices.targets}
    required = tuple(target for target in recipe.verify.required if target in kept)
    return recipe.model_copy(
        update={"targets": kept, "verify": recipe.verify.model_copy(update={"required": required})}
    )


def settle_source(choices: Choices, recipe: Recipe) -> Source:
    """The checkpoint of --model, or the recipe's own."""
    if choices.model is not None:
        return find_source(choices.model, choices.revision)
    return find_source(recipe.model.source, recipe.model.revision)


@telling_lines
def plan_job(choices: Choices, watcher: Watcher = SILENT) -> tuple[Recipe, Plan]:
    """What a build would write and need; writes a temporary file to measure the disk, and nothing else.

    What this machine lacks for it is its `shortage`; the time is measured where there is none. A budget has the
    sensitivity of every matrix measured, which takes minutes, and is kept in the cache for the build.
    """
    with computing_by(products_on(choices.device)):
        return _plan(choices, watcher)


def _plan(choices: Choices, watcher: Watcher) -> tuple[Recipe, Plan]:
    start = perf_counter()
    recipe = settle_recipe(choices)
    threads = choices.threads or cores()
    source = settle_source(choices, recipe)
    checkpoint = cache(partial(source_digest, source.folder, threads))
    memory = CostMemory(checkpoint, choices.fresh, watcher.say)
    with fixed_blas():
        model, assignment = settle_schemes(open_model(source, recipe), recipe, memory, watcher.start, watcher.advance)
    plan = replace(make_plan(model, recipe, EXPORTERS, threads, choices.verify), assignment=assignment)
    prepare = perf_counter() - start - plan.compiling - memory.seconds  # these once: the next build finds them
    out = output(choices, recipe)
    if not choices.fresh and may_be_kept(model.graph, recipe):
        if text := calibration_text(model, recipe, watcher.say):
            key = key_of(model, recipe, text, checkpoint())
            plan = plan.with_cached_calibration() if is_kept(key) else plan
    else:
        check_calibration(model, recipe, watcher.say)
    shortage = shortage_of(plan, out, cache_disk())
    if shortage is not None:
        return recipe, replace(plan, shortage=shortage)
    files, read = source_files(source.folder).values(), NOTHING if plan.cached else reading(model, recipe)
    calibrated = is_calibrated(model.graph, recipe)
    time = estimate_time(model.graph, plan.layouts, files, disk_of(out), threads, read, prepare, calibrated)
    return recipe, replace(plan, time=time)


def output(choices: Choices, recipe: Recipe) -> Path:
    """The folder that a build writes."""
    return (choices.out or Path("dist") / recipe.name).absolute()


@telling_lines
def build(choices: Choices, watcher: Watcher) -> dict[str, Any]:
    """Build every target of a recipe and return the manifest.

    Artifacts are written beside `out` and renamed to it at the very end. A build that fails its gates is moved to
    `<out>.rejected` for a look, and GateError is raised; `out` stays as it was. It does so too if somebody else put
    something there meanwhile: UsageError then names the folder in which the build is. While another process builds into
    `out`, this one waits.

    What a killed build of the same content has done is taken over, by content digest (tundish.resume), unless the build
    is to be fresh.
    """
    recipe = settle_recipe(choices)
    signer = load_signer(choices.sign_key)
    out = output(choices, recipe)
    with holding(out, watcher.say):
        restore(out, watcher.say)
        require_replaceable(out, recipe.targets)
        require_replaceable(rejected_name(out), Target)
        with left_by_killed(out, watcher.say, lambda folder: not choices.fresh and has_journal(folder)) as left:
            return _build(choices, recipe, out, left, signer, watcher)


def _build(
    choices: Choices, recipe: Recipe, out: Path, left: Path | None, signer: Signer | None, watcher: Watcher
) -> dict[str, Any]:
    """Build into `out`, which this process holds, and go on with what is `left` of the same build."""
    threads = choices.threads or cores()
    source = settle_source(choices, recipe)
    watcher.say(f"model: {source.name} ({source.folder})")
    stamp, licences = source_stamp(source.folder), licence_files(source.folder)
    files = source_files(source.folder)
    read = file_stamp(files)
    with (
        computing_by(products_on(choices.device)),
        blaming_changes(source.folder, stamp),
        in_use(source.folder),
        digesting_source(source.folder, stamp, choices.known) as inputs,
    ):

        def digests() -> dict[str, str]:
            sha256 = inputs.result()
            return {name: sha256[path] for name, path in files.items()}

        memory = CostMemory(digests, choices.fresh, watcher.say)
        with fixed_blas():
            opened = open_model(source, recipe)
            model, assignment = settle_schemes(opened, recipe, memory, watcher.start, watcher.advance)
        watcher.say("planning; kernels that were never used here are compiled")
        plan = replace(make_plan(model, recipe, EXPORTERS, threads, choices.verify), assignment=assignment)
        text = calibration_text(model, recipe, watcher.say)
        key = None if text is None else key_of(model, recipe, text, digests())
        with keeping(key, out, choices.fresh, threads, watcher.say) as keeper:
            plan = plan if keeper.found is None else plan.with_cached_calibration()
            shortage = shortage_of(replace(plan, disk=plan.disk - bytes_in(left)), out, cache_disk())
            if shortage is not None:
                raise shortage
            with fixed_blas():
                calibrated = calibrate(model, recipe, text, keeper.keep, watcher.say, watcher.start, watcher.advance)
            learned = calibration_digest(calibrated, threads)

            @cache
            def content() -> str:
                return content_key(source, digests(), model, recipe, plan.layouts, learned)

            def known() -> bool:
                return inputs.done() and file_stamp(files) == read

            with unfinished(out, left, content, known, watcher.say) as (folder, journal):
                watcher.start(f"quantizing into {', '.join(plan.layouts)}", plan.elements)
                with naming_need(plan.disk):
                    poured = pour(
                        calibrated.graph, plan.layouts, folder, watcher.advance, calibrated.quantize, threads, journal
                    )
                    require_unchanged(source.folder, stamp)
                    manifest = build_manifest(source, inputs.result(), model, recipe, plan, poured, calibrated.record)
                    require_unchanged(source.folder, stamp)
                    with disk_errors(out):
                        journal.write()
                        write_licences(folder, manifest, licences)
                        write_manifest(folder, manifest)
                _note_source(source, manifest["source"]["files"], watcher)
                verified, results = choices.verify and recipe.verify.enabled, None
                passed = still_verified(journal.verified if verified else {}, manifest["targets"], EXPORTERS)
                if poured.kept:
                    watcher.say(taken_over(poured, passed))
                if verified:

                    def note(result: TargetResult) -> None:
                        with disk_errors(out), naming_need(plan.disk):
                            files = manifest["targets"][result.target]["files"]
                            journal.add_verified(result.target, verified_record(result, files))

                    results = verify(
                        model, source, recipe, EXPORTERS, folder, poured.matrices, threads, watcher.say, passed, note
                    )
                    require_unchanged(source.folder, stamp)
                with naming_need(plan.disk):
                    _record(manifest, results, folder, out, signer)
                journal.remove()
                require_gates(manifest, results, folder, out)
                with deferred_signals():  # nobody shall be told of an interruption that nothing was published
                    publish(folder, out, recipe.targets)
                    watcher.published(out)
                    watcher.say(f"written: {out}{' (signed)' if signer else ''}")
    return manifest


def _note_source(source: Source, files: Mapping[str, str], watcher: Watcher) -> None:
    """For `tundish verify`, which finds Hub ids by name, and any other checkpoint by this."""
    if source.repo_id is None:
        try:
            remember(files, source.folder)
        except ResourceError as error:  # no reason to give up a build
            watcher.say(f"`tundish verify` will need --model: {error}")


def _record(
    manifest: dict[str, Any],
    results: Sequence[TargetResult] | None,
    folder: Path,
    out: Path,
    signer: Signer | None = None,
) -> None:
    """Write the manifest, with what verification found, and what goes with it. What missed a gate is not signed."""
    if results is not None:
        manifest["verification"] = verification_record(results)
    with disk_errors(out), deferred_signals():
        write_papers(folder, manifest, None if failed_gates(results or ()) else signer)


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
        f"{result.target} {gate.name}: "
        + (f"{gate.figure:.4g} against {gate.threshold:g}" if gate.threshold else gate.detail)
        for result in results
        for gate in result.gates
        if gate.passed is False
    ]


def verify_again(
    folder: Path, model: str | None, threads: int | None, watcher: Watcher, key: Path | None = None
) -> dict[str, Any]:
    """Check a published folder: its files' digests, the signature if there is a public key in the file `key`, then
    every gate anew.

    Updates its manifest, report and cards, unless it is signed: what somebody put a name to stays as it is.
    """
    held = folder.resolve()
    with holding(held, watcher.say):
        restore(held, watcher.say)
        return _verify_again(folder, model, threads or cores(), watcher, key)


def _verify_again(folder: Path, model: str | None, count: int, watcher: Watcher, key: Path | None) -> dict[str, Any]:
    intact = require_intact(folder, count, key)
    watcher.say(intact.signature.value)
    manifest = intact.manifest
    recipe = recorded_recipe(manifest, folder)
    source, stamp = recorded_source(manifest["source"], model, count)
    digests = {name: entry["digest"] for name, entry in manifest["weights"].items() if "digest" in entry}
    with blaming_changes(source.folder, stamp):
        opened = with_recorded_schemes(open_model(source, recipe), recipe, manifest)
        results = verify(opened, source, recipe, EXPORTERS, folder, digests, count, watcher.say)
    require_unchanged(source.folder, stamp)
    if intact.signature is Signature.NONE:
        _record(manifest, results, folder, folder)
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
    elif record["name"] == SAMPLE:
        source = find_source(SAMPLE, None)
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


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
