"""A build from end to end: plan, pour, verify, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from pathlib import Path
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, TypeVar

from converters.arrays import computing_by, products_on
from converters.errors import ResourceError, UsageError
from converters.file_digest import Digests
from converters.source import (
    Known,
    Source,
    SourceDigests,
    Stamp,
    blaming_changes,
    digesting_source,
    file_stamp,
    require_unchanged,
    source_digest,
    source_files,
    source_stamp,
)
from exporters.base import Model, Target
from exporters.registry import EXPORTERS
from tundish.blas import fixed_blas
from tundish.cache import cache_disk, in_use
from tundish.calibrate import (
    NOTHING,
    Calibrated,
    calibrate,
    calibration_text,
    check_calibration,
    is_calibrated,
    reading,
)
from tundish.calibration_cache import is_kept, keeping, key_of, may_be_kept
from tundish.cost_cache import CostMemory
from tundish.disk import disk_errors, naming_need
from tundish.estimate import estimate_time
from tundish.folder_name import require_folder_name
from tundish.gates import record_results, rejected_name, require_gates
from tundish.holding import holding
from tundish.journal import Journal, has_journal
from tundish.manifest import build_manifest
from tundish.manifest_file import write_manifest
from tundish.model import find_source, open_model
from tundish.papers import write_licences
from tundish.plan import Plan, disk_of, make_plan, shortage_of
from tundish.pour import Poured, pour
from tundish.processors import cores
from tundish.publish import left_by_killed, publish, reclaim, require_name, require_replaceable, restore, staging
from tundish.recipe import Recipe, line_of, load_recipe
from tundish.recipe_errors import MisfitError
from tundish.remarks import remarks, try_template
from tundish.results import TargetResult
from tundish.resume import (
    bytes_in,
    calibration_digest,
    content_key,
    still_verified,
    taken_over,
    unfinished,
    verified_record,
)
from tundish.settle import settle_schemes
from tundish.signals import deferred_signals
from tundish.signing import Signer, load_signer
from tundish.source_card import licence_files
from tundish.tokenizer_trial import try_tokenizer
from tundish.user_path import require_output
from tundish.verify import verify
from tundish.watcher import SILENT, Watcher
from tundish.whereabouts import remember

P = ParamSpec("P")
T = TypeVar("T")


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
    """What a build would write and need; writes temporary files to measure the disk, and nothing else.

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
        opened = open_model(source, recipe)
        try_tokenizer(source.folder, opened.tokenizer)
        told = _tell_remarks(opened, recipe, source, choices, watcher)
        model, assignment = settle_schemes(opened, recipe, memory, watcher.start, watcher.advance)
    plan = make_plan(model, recipe, EXPORTERS, threads, choices.verify)
    plan = replace(plan, assignment=assignment, remarks=told)
    prepare = perf_counter() - start - plan.compiling - memory.seconds  # these once: the next build finds them
    out = output(choices, recipe)
    text = None
    if not choices.fresh and may_be_kept(model.graph, recipe):
        text = calibration_text(model, recipe, watcher.say)
    if text is None:
        check_calibration(model, recipe, watcher.say)
    elif is_kept(key_of(model, recipe, text, checkpoint())):
        plan = plan.with_cached_calibration()
    shortage = shortage_of(plan, out, cache_disk())
    if shortage is not None:
        return recipe, replace(plan, shortage=shortage)
    files, read = source_files(source.folder).values(), NOTHING if plan.cached else reading(model, recipe)
    calibrated = is_calibrated(model.graph, recipe)
    time = estimate_time(model.graph, plan.layouts, files, disk_of(out), threads, read, prepare, calibrated)
    return recipe, replace(plan, time=time)


def _tell_remarks(model: Model, recipe: Recipe, source: Source, choices: Choices, watcher: Watcher) -> tuple[str, ...]:
    """Say what is remarkable in the model. ModelError if verification would fail over its chat template."""
    told = remarks(model, source.folder)
    for remark in told:
        watcher.say(f"note: {remark}")
    if choices.verify and recipe.verify.enabled:
        try_template(model, recipe)
    return told


def output(choices: Choices, recipe: Recipe) -> Path:
    """The folder that a build writes. UsageError if its name, which may be the recipe's, is no folder's."""
    return require_output((choices.out or Path("dist") / require_folder_name(recipe.name, choices.recipe)).absolute())


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
        rejected = rejected_name(out)
        for name, targets in ((out, recipe.targets), (rejected, Target)):
            restore(name, watcher.say)
            require_replaceable(name, targets)
        require_name(out)
        reclaim(rejected, watcher.say)
        with left_by_killed(out, watcher.say, lambda folder: not choices.fresh and has_journal(folder)) as left:
            return _build(choices, recipe, out, left, signer, watcher)


@dataclass(frozen=True, slots=True)
class _Build:
    """What the steps of a build have in common; `digests` are those of the source's files, in the taking."""

    choices: Choices
    recipe: Recipe
    out: Path
    threads: int
    source: Source
    files: Mapping[str, Path]
    stamp: Stamp
    digests: Digests | Known
    watcher: Watcher

    def sha256(self) -> dict[str, str]:
        """Of the source's files, by name; waits for them."""
        found = self.digests.result()
        named = {name: found[path] for name, path in self.files.items()}
        self.source.require_announced(named)
        return named

    def knows_source(self) -> bool:
        """Whether the digests are there, of files that are still the same."""
        return self.digests.done() and file_stamp(self.files) == self.stamp

    def require_unchanged(self) -> None:
        """ModelError if the source is not what it was when the build began."""
        require_unchanged(self.source.folder, self.stamp)


def _build(
    choices: Choices, recipe: Recipe, out: Path, left: Path | None, signer: Signer | None, watcher: Watcher
) -> dict[str, Any]:
    """Build into `out`, which this process holds, and go on with what is `left` of the same build."""
    threads = choices.threads or cores()
    source = settle_source(choices, recipe)
    watcher.say(f"model: {source.name} ({source.folder})")
    stamp, files = source_stamp(source.folder), source_files(source.folder)
    with (
        computing_by(products_on(choices.device)),
        blaming_changes(source.folder, stamp),
        in_use(source.folder),
        digesting_source(source.folder, stamp, choices.known) as digests,
    ):
        job = _Build(choices, recipe, out, threads, source, files, stamp, digests, watcher)
        model, plan = _plan_artifacts(job)
        text = calibration_text(model, recipe, watcher.say)
        key = None if text is None else key_of(model, recipe, text, job.sha256())
        with keeping(key, out, choices.fresh, threads, watcher.say) as keeper:
            plan = plan if keeper.found is None else plan.with_cached_calibration()
            shortage = shortage_of(plan, out, cache_disk(), bytes_in(left))
            if shortage is not None:
                raise shortage
            with fixed_blas():
                calibrated = calibrate(model, recipe, text, keeper.keep, watcher.say, watcher.start, watcher.advance)
            return _finish(job, model, plan, calibrated, left, signer)


def _finish(
    job: _Build, model: Model, plan: Plan, calibrated: Calibrated, left: Path | None, signer: Signer | None
) -> dict[str, Any]:
    """Pour, verify and publish, or go on with what is `left` of that; the manifest."""
    recipe, out, watcher = job.recipe, job.out, job.watcher
    learned = calibration_digest(calibrated, job.threads)

    @cache
    def content() -> str:
        return content_key(job.source, job.sha256(), model, recipe, plan.layouts, learned)

    with unfinished(out, left, content, job.knows_source, watcher.say) as (folder, journal):
        with naming_need(plan.disk):
            poured, manifest = _pour_artifacts(job, model, plan, calibrated, folder, journal)
            results = _verify_artifacts(job, model, poured, manifest, folder, journal)
            record_results(manifest, results, folder, out, signer)
        journal.close()
        require_gates(manifest, results, folder, out)
        with deferred_signals():  # nobody shall be told of an interruption that nothing was published
            publish(folder, out, recipe.targets)
            watcher.published(out)
            watcher.say(f"written: {out}{' (signed)' if signer else ''}")
    return manifest


def _plan_artifacts(job: _Build) -> tuple[Model, Plan]:
    """The model, with the schemes that a budget chose, and what is to be written of it."""
    recipe, watcher = job.recipe, job.watcher
    memory = CostMemory(job.sha256, job.choices.fresh, watcher.say)
    with fixed_blas():
        opened = open_model(job.source, recipe)
        try_tokenizer(job.source.folder, opened.tokenizer)
        told = _tell_remarks(opened, recipe, job.source, job.choices, watcher)
        model, assignment = settle_schemes(opened, recipe, memory, watcher.start, watcher.advance)
    watcher.say("planning; kernels that were never used here are compiled")
    plan = make_plan(model, recipe, EXPORTERS, job.threads, job.choices.verify)
    return model, replace(plan, assignment=assignment, remarks=told)


def _pour_artifacts(
    job: _Build, model: Model, plan: Plan, calibrated: Calibrated, folder: Path, journal: Journal
) -> tuple[Poured, dict[str, Any]]:
    """Write the artifacts, as far as they are not there, and the manifest."""
    source, watcher = job.source, job.watcher
    licences = licence_files(source.folder)
    watcher.start(f"quantizing into {', '.join(plan.layouts)}", plan.elements)
    quantize = calibrated.quantize
    poured = pour(calibrated.graph, plan.layouts, folder, watcher.advance, quantize, job.threads, journal)
    job.require_unchanged()
    manifest = build_manifest(source, job.digests.result(), model, job.recipe, plan, poured, calibrated.record)
    job.require_unchanged()
    with disk_errors(job.out):
        journal.write()
        write_licences(folder, manifest, licences)
        write_manifest(folder, manifest)
    _note_source(source, manifest["source"]["files"], watcher)
    return poured, manifest


def _verify_artifacts(
    job: _Build, model: Model, poured: Poured, manifest: dict[str, Any], folder: Path, journal: Journal
) -> Sequence[TargetResult] | None:
    """The results of every target, those of a killed build among them; None if none are asked for."""
    recipe, say = job.recipe, job.watcher.say
    asked = job.choices.verify and recipe.verify.enabled
    passed = still_verified(journal.verified if asked else {}, manifest["targets"], EXPORTERS)
    if poured.kept:
        say(taken_over(poured, passed))
    if not asked:
        return None

    def note(result: TargetResult) -> None:
        files = manifest["targets"][result.target]["files"]
        journal.add_verified(result.target, verified_record(result, files))

    with disk_errors(job.out), staging(job.out) as scratch:  # beside the build's folder, all of which is published
        results = verify(
            model, job.source, recipe, EXPORTERS, folder, poured.matrices, scratch, job.threads, say, passed, note
        )
    job.require_unchanged()
    return results


def _note_source(source: Source, files: Mapping[str, str], watcher: Watcher) -> None:
    """For `tundish verify`, which finds Hub ids by name, and any other checkpoint by this."""
    if source.repo_id is None:
        try:
            remember(files, source.folder)
        except ResourceError as error:  # no reason to give up a build
            watcher.say(f"`tundish verify` will need --model: {error}")
