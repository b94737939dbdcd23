"""Artifacts side by side: size, divergence from the float32 model, and speed, each in its own runtime.

Every figure is measured anew, on one held-out text for all, so that rows of one table can be compared.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import GateError, UsageError
from converters.source import require_unchanged
from exporters.base import Exporter, Model, Target, TargetOptions
from exporters.registry import EXPORTERS
from tundish.child import run_child
from tundish.disk import disk_errors, replace_files
from tundish.divergence import Divergence
from tundish.escapes import markdown
from tundish.heldout import evaluation_text
from tundish.integrity import require_intact
from tundish.manifest_file import MANIFEST, read_manifest
from tundish.measure import Request
from tundish.model import open_model
from tundish.picture import Mark, require_matplotlib, size_against_kl
from tundish.processors import cores
from tundish.recheck import recorded_recipe, recorded_source
from tundish.recipe import Recipe
from tundish.report import cell, table
from tundish.scratch import temporary_folder
from tundish.settle import with_recorded_schemes
from tundish.text_files import Conversation, read_texts, text_files
from tundish.user_path import expanded
from tundish.verify import cut, divergence_of, missing_runtime, reference_logits, stream_of, text_shape

REPORT, PICTURE = "compare.md", "compare.svg"
TIMED_TOKENS = 33  # the first is not counted: the prompt's time is in it
SPEED = (
    f"tokens/s: {TIMED_TOKENS - 1} greedy tokens after a short prompt, one sequence, on this machine. Runtimes run as "
    "verification opens them, with their approximations off (float32 caches; MLX on a CPU has numpy multiply): that "
    "ranks artifacts of one container, and is no benchmark of runtimes."
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the command line asks for. `sequences` and `length` None: the evaluation of the first artifact's recipe;
    `text` None: the held-out text."""

    artifacts: Sequence[Path]
    model: str | None = None
    text: Path | None = None
    sequences: int | None = None
    length: int | None = None
    out: Path | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Build:
    """A folder that `tundish build` wrote."""

    folder: Path
    manifest: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Artifact:
    """One container of a build, and what the tables call it."""

    label: str
    build: Build
    target: Target

    @property
    def folder(self) -> Path:
        return self.build.folder / self.target

    @property
    def exporter(self) -> Exporter:
        return EXPORTERS[self.target]

    @property
    def options(self) -> TargetOptions:
        return self.build.recipe.targets[self.target]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a runtime did; `failure` says why it did not."""

    divergence: Divergence | None = None
    tokens_per_second: float | None = None
    versions: Mapping[str, str] | None = None
    failure: str | None = None


def compare(asked: Comparison, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure every artifact and write the report and the picture if `out` is given; the document that --json prints.

    A runtime that fails leaves its row without figures: see `failure_of`. UsageError if the artifacts are not of one
    checkpoint; GateError if their files are not those of their manifests.
    """
    if asked.out is not None:
        _require_outside_of_builds(asked.out)
        require_matplotlib()
    artifacts = find_artifacts(asked.artifacts)
    builds = {artifact.build.folder: artifact.build for artifact in artifacts}
    _require_one_source(list(builds.values()))
    threads = asked.threads or cores()
    for build in builds.values():
        require_intact(build.folder, threads)
    first = artifacts[0].build
    source, stamp = recorded_source(dict(first.manifest["source"]), asked.model, threads)
    models = {
        folder: with_recorded_schemes(open_model(source, build.recipe), build.recipe, build.manifest)
        for folder, build in builds.items()
    }
    count, length = _evaluation(asked, artifacts, models)
    model = models[first.folder]
    rows: list[dict[str, Any]] = []
    with temporary_folder() as folder:
        sequences = cut(stream_of(model, _texts(asked)), count, length, str(asked.text or _text_name(asked)))
        say(f"reference: the interpreter reads {count} × {length} tokens of {_text_name(asked)} in float32")
        np.save(folder / "sequences.npy", sequences)
        # One for each of LongRoPE's lists of factors, between which the contexts of recipes decide.
        references = {
            each.graph.config.rope: reference_logits(each, sequences, folder, f"reference-{index}")
            for index, each in enumerate({each.graph.config.rope: each for each in models.values()}.values())
        }
        measured: list[Measured] = []
        for artifact in artifacts:
            say(f"{artifact.label}: opening in its runtime")
            reference = references[models[artifact.build.folder].graph.config.rope]
            measured.append(_measure(artifact, sequences, reference, folder, _time_limit(artifacts), threads))
            rows.append(_row(artifact, models[artifact.build.folder], length, measured[-1]))
    require_unchanged(source.folder, stamp)
    perplexities = [each.divergence.reference_perplexity for each in measured if each.divergence is not None]
    document = {
        "source": {key: first.manifest["source"][key] for key in ("name", "repo_id", "revision")},
        "text": {"name": _text_name(asked), "sequences": count, "length": length, "positions": count * length},
        "reference": {"perplexity": perplexities[0] if perplexities else None},
        "speed": SPEED,
        "artifacts": rows,
    }
    if asked.out is not None:
        _write(document, asked.out)
        say(f"written: {asked.out / REPORT}")
    return document


def _texts(asked: Comparison) -> Iterator[str]:
    if asked.text is None:
        yield from evaluation_text()
        return
    for path in text_files(expanded(asked.text)):
        for text in read_texts(path):
            yield text.text if isinstance(text, Conversation) else text


def _text_name(asked: Comparison) -> str:
    return "held-out text" if asked.text is None else asked.text.name


def failure_of(document: Mapping[str, Any]) -> GateError | None:
    """The error that the command ends with if a runtime failed; a runtime that is not installed is none."""
    failures = [f"{row['artifact']}: {row['note']}" for row in document["artifacts"] if row["failed"]]
    return GateError("artifacts could not be measured", found="; ".join(failures)) if failures else None


# ---- what is compared ----


def find_artifacts(paths: Sequence[Path]) -> list[Artifact]:
    """Each container of a build's folder, or the one that <build>/<target> names. Duplicates count once."""
    found: dict[Path, tuple[Path, Target]] = {}
    for path in paths:
        folder = expanded(path).resolve()
        if (folder / MANIFEST).is_file() or not (folder.parent / MANIFEST).is_file():
            chosen = [(folder, target) for target in map(Target, read_manifest(folder)["targets"])]
        else:
            targets = read_manifest(folder.parent)["targets"]
            if folder.name not in targets:
                raise UsageError("not an artifact of its build", where=str(path), expected=", ".join(targets))
            chosen = [(folder.parent, Target(folder.name))]
        found |= {build / target: (build, target) for build, target in chosen}
    builds = {}
    for folder in dict.fromkeys(build for build, _ in found.values()):
        manifest = read_manifest(folder)
        builds[folder] = Build(folder, manifest, recorded_recipe(manifest, folder))
    names = [folder.name for folder in builds]
    short = {folder: folder.name if names.count(folder.name) == 1 else str(folder) for folder in builds}
    return [Artifact(f"{short[build]}/{target}", builds[build], target) for build, target in found.values()]


def _require_one_source(builds: Sequence[Build]) -> None:
    first = builds[0]
    for build in builds[1:]:
        ours, theirs = (each.manifest["source"] for each in (first, build))
        has, other = ours["files"], theirs["files"]
        differing = sorted(name for name in {**has, **other} if has.get(name) != other.get(name))
        if differing:
            raise UsageError(
                "the artifacts were made from different checkpoints, whose figures say nothing about each other",
                where=f"{first.folder}, {build.folder}",
                expected=f"the files of {ours['name']}",
                found=f"{theirs['name']}, with other contents in {', '.join(differing[:4])}",
                mend="Compare artifacts of one checkpoint.",
            )


def _require_outside_of_builds(out: Path) -> None:
    what = None
    if out.exists() and not out.is_dir():
        what = "--out is not a folder"
    elif any((folder / MANIFEST).is_file() for folder in (out.resolve(), *out.resolve().parents)):
        what = "--out lies in a build, whose manifest lists all its files"
    if what is not None:
        raise UsageError(what, where=str(out), mend="Choose another folder.")


def _evaluation(asked: Comparison, artifacts: Sequence[Artifact], models: Mapping[Path, Model]) -> tuple[int, int]:
    """How many sequences of how many tokens: as asked, or as the first artifact was verified, within every context."""
    first = artifacts[0]
    text = first.build.recipe.verify.for_target(first.target).text
    shortest = min(artifacts, key=lambda artifact: models[artifact.build.folder].context_length)
    model = models[shortest.build.folder]
    context = model.context_length
    if asked.length is not None and asked.length > context:
        raise UsageError(
            "--length is longer than an artifact's context",
            where=shortest.label,
            expected=f"at most {context} tokens",
            found=str(asked.length),
        )
    sequences, length = text_shape(text, model)
    return asked.sequences or sequences, asked.length or length


def _time_limit(artifacts: Iterable[Artifact]) -> int:
    """Seconds for one runtime: the most that a recipe gives one, since the text need not be its own."""
    return max(artifact.build.recipe.verify.for_target(artifact.target).time_limit for artifact in artifacts)


# ---- one artifact ----


def _measure(
    artifact: Artifact,
    sequences: NDArray[np.int64],
    reference: Sequence[Path],
    scratch: Path,
    time_limit: int,
    threads: int,
) -> Measured:
    """Open it in a process of its own; `scratch` has sequences.npy and keeps nothing of this artifact."""
    if missing_runtime(artifact.exporter):
        return Measured()
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        request = Request(
            target=artifact.target,
            artifact=str(artifact.folder),
            recipe=artifact.build.recipe.model_dump(mode="json", exclude_none=True),
            folder=name,
            sequences=str(scratch / "sequences.npy"),
            prompt=evaluation_text()[0][:120],
            tokens=TIMED_TOKENS,
        )
        (folder / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
        ending = run_child("tundish.measure", [str(folder / "request.json")], folder / "log.txt", time_limit, threads)
        if ending.failure:
            return Measured(failure=f"the runtime process {ending.failure}")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        divergence = divergence_of(reference, sequences, folder, "logits")
    return Measured(divergence, result["tokens_per_second"], result["versions"])


def _row(artifact: Artifact, model: Model, length: int, measured: Measured) -> dict[str, Any]:
    exporter, divergence = artifact.exporter, measured.divergence
    stored = weight_bytes(model, exporter, artifact.options)
    weights = sum(math.prod(weight.shape) for weight in model.graph.weights.values())
    note = measured.failure
    if missing := missing_runtime(exporter):
        note = f"not measured: {', '.join(missing)} not installed; pip install 'tundish[{exporter.extra}]'"
    elif divergence is not None and divergence.kl_mean is None:
        note = "its logits give no finite KL"
    elif note is None:
        semantics = exporter.semantics(model, artifact.options)
        if length > semantics.exact_to:
            note = f"read {length} tokens, but claims {semantics.exact_to} at most"
    return {
        "artifact": artifact.label,
        "folder": str(artifact.folder),
        "target": artifact.target.value,
        "recipe": artifact.build.recipe.name,
        "scheme": artifact.build.recipe.schemes.default.name,
        "bytes": sum(path.stat().st_size for path in artifact.folder.rglob("*") if path.is_file()),
        "weight_bytes": stored,
        "bits_per_weight": None if stored is None else 8 * stored / weights,
        "kl_mean": None if divergence is None else divergence.kl_mean,
        "kl_p99": None if divergence is None else divergence.kl_p99,
        "top1": None if divergence is None else divergence.top1,
        "perplexity": None if divergence is None else divergence.perplexity,
        "tokens_per_second": measured.tokens_per_second,
        "versions": dict(measured.versions or {}),
        "failed": measured.failure is not None,
        "note": note,
    }


def weight_bytes(model: Model, exporter: Exporter, options: TargetOptions) -> int | None:
    """Bytes of the weights alone, scales included: a tied matrix that is stored once counts once.

    None if what lays the artifact out is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in exporter.requires):
        return None
    layout = exporter.layout(model, options)
    stored = {
        (place.file, place.offset): place.row_nbytes * model.graph.weights[name].shape[0]
        for name, places in layout.places.items()
        for place in places
    }
    return sum(stored.values())


# ---- the report ----

_HEADER = ["artifact", "weights, bytes", "bits/weight", "KL mean", "KL 99 %", "top-1 same", "perplexity", "tokens/s"]


def table_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """The header, the reference, and a row an artifact, as text."""
    reference = ["float32 reference", *["–"] * 5, cell(document["reference"]["perplexity"], ".3f"), "–"]
    return [
        _HEADER,
        reference,
        *(
            [
                row["artifact"],
                cell(row["weight_bytes"], ","),
                cell(row["bits_per_weight"], ".3f"),
                cell(row["kl_mean"], ".4g"),
                cell(row["kl_p99"], ".4g"),
                cell(row["top1"], ".1%"),
                cell(row["perplexity"], ".3f"),
                cell(row["tokens_per_second"], ".1f"),
            ]
            for row in document["artifacts"]
        ),
    ]


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What has to be said about the table: its text, its speeds, and artifacts that lack figures."""
    text = document["text"]
    measured = (
        f"KL(float32 model || artifact) in nats, over {text['positions']:,} positions of {text['name']}: "
        f"{text['sequences']} sequences of {text['length']} tokens."
    )
    notes = [f"{row['artifact']}: {row['note']}" for row in document["artifacts"] if row["note"]]
    return [measured, document["speed"], *notes]


def write_comparison(document: Mapping[str, Any], picture: bool) -> str:
    """compare.md."""
    source = document["source"]
    title = (source["repo_id"] or source["name"]) + (f" at {source['revision']}" if source["revision"] else "")
    header, *rows = table_rows(document)
    versions = [
        "- "
        + markdown(
            f"{row['artifact']}: recipe {row['recipe']}, scheme {row['scheme']}, {row['bytes']:,} bytes of files"
            + "".join(f", {name} {number}" for name, number in row["versions"].items())
        )
        for row in document["artifacts"]
    ]
    parts = [f"# Artifacts of {markdown(title)}", table(header, rows)]
    parts += [f"![Size against KL]({PICTURE})"] if picture else []
    return "\n\n".join([*parts, *map(markdown, remarks(document)), "## Artifacts", "\n".join(versions)]) + "\n"


def _write(document: Mapping[str, Any], out: Path) -> None:
    marks = [
        Mark(row["artifact"], row["target"], row["weight_bytes"], row["kl_mean"])
        for row in document["artifacts"]
        if row["weight_bytes"] is not None and row["kl_mean"] is not None and math.isfinite(row["kl_mean"])
    ]
    files = {REPORT: write_comparison(document, bool(marks))} | ({PICTURE: size_against_kl(marks)} if marks else {})
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        replace_files({out / name: text.encode() for name, text in files.items()})
