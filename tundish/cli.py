"""The command line. Results go to stdout, everything else to stderr; exit statuses are part of the contract."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from converters.errors import ResourceError, TundishError
from exporters.target import Target
from tundish import console, tables
from tundish.console import figures_of_failed_gates, people, show, watcher
from tundish.escapes import terminal
from tundish.letters import use_plain_letters
from tundish.options import (
    BuildArgument,
    DeviceOption,
    EventsOption,
    FreshOption,
    JsonOption,
    KeyOption,
    MetricsOption,
    ModelOption,
    OutOption,
    RecipeArgument,
    SignKeyOption,
    TargetOption,
    ThreadsOption,
    VerifyOption,
    can_be_looked_at,
    can_be_written,
)
from tundish.shortage import is_out_of_memory
from tundish.signals import ENDING, unwind_at_signals


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"tundish {version('tundish')}")
        raise typer.Exit


# What is not yet of its type, even an absent value, typer converts by pydantic, whose import takes longer than listing
# the recipes. The --help that typer adds to every command has such a value, and so has an argument left out.
class _Group(TyperGroup):
    def get_help_option(self, ctx: typer.Context) -> TyperOption | None:  # type: ignore[override]  # typer's own Context
        return _settled(super().get_help_option(ctx))


class _Command(TyperCommand):
    def get_help_option(self, ctx: typer.Context) -> TyperOption | None:  # type: ignore[override]
        return _settled(super().get_help_option(ctx))


def _settled(flag: TyperOption | None) -> TyperOption | None:
    if flag is not None:
        flag.default = False
    return flag


app = typer.Typer(
    name="tundish",
    cls=_Group,
    help="One Hugging Face language model, quantized once, poured into GGUF, ONNX, OpenVINO and MLX, and verified.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The entry point: runs a command and turns errors into a paragraph on stderr and an exit status."""
    console.if_interrupted("nothing was published")
    os.environ.setdefault("USE_TORCH", "0")  # transformers would import it where it is installed, which takes seconds
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # it would look for some in all that is installed
    unwind_at_signals()
    use_plain_letters()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no "×" is no reason to fail
    try:
        app(standalone_mode=True)
    except TundishError as error:
        print(f"tundish: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except (MemoryError, OSError, ImportError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told = ResourceError("out of memory", found=str(error) or None, mend="Allow more: see `tundish plan`.")
        print(f"tundish: {told}", file=sys.stderr)
        sys.exit(told.exit_status)
    except SystemExit as ending:
        if ending.code in [128 + number for number in ENDING]:
            print(f"tundish: interrupted; {console.state}.", file=sys.stderr)
        raise


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One Hugging Face language model, quantized once, poured into GGUF, ONNX, OpenVINO and MLX, and verified."""


@app.command()
def build(
    recipe: RecipeArgument,
    model: ModelOption = None,
    out: OutOption = None,
    target: TargetOption = None,
    verify: VerifyOption = True,
    threads: ThreadsOption = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh", help="Take over what earlier builds found out, and what a killed one had done, or not."
        ),
    ] = True,
    device: DeviceOption = None,
    sign_key: SignKeyOption = None,
    events: EventsOption = None,
    metrics: MetricsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a model by a recipe, verify the artifacts in their runtimes, and publish them."""
    from tundish import job
    from tundish.observe import build_titles, observing

    choices = job.Choices(
        recipe, model, out, target or (), verify, threads, fresh=not resume, device=device, sign_key=sign_key
    )
    titles = build_titles(recipe, model)
    with figures_of_failed_gates(as_json), observing("build", titles, events, metrics) as observed:
        with watcher(observed.events) as watching:
            manifest = observed.manifest = job.build(choices, watching)
        show(manifest, as_json, tables.summary_text)


@app.command()
def matrix(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML with models and recipes: see docs/jobs.md.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Builds go to <out>/<model>/<recipe>. Default: the file's, or dist/<file>.",
            callback=can_be_written,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", metavar="ADDRESS", help="Of Dask, tcp://host:8786. Default: this machine."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of each build. Default: its share of the cores.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="For all at once, such as 16GB. Default: most of what is free."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Build and calibrate anew what is there already.")] = False,
    sign_key: SignKeyOption = None,
    events: EventsOption = None,
    metrics: MetricsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build every recipe of a file for every model of it, as many at once as memory and cores allow."""
    from tundish import matrix as matrices
    from tundish.folder_name import require_folder_name
    from tundish.matrix_cluster import parse_memory
    from tundish.matrix_file import load_matrix
    from tundish.observe import observing
    from tundish.signing import load_signer
    from tundish.user_path import require_output

    console.if_interrupted("what was built by then is published; the same command goes on from there")
    with observing("matrix", (file.stem, ""), events, metrics) as observed:
        asked = load_matrix(file)
        nbytes = None if memory is None else parse_memory(memory)
        into = (out or asked.out or Path("dist") / require_folder_name(file.stem, str(file))).absolute()
        require_output(into)
        options = matrices.Options(into, scheduler, nbytes, threads, fresh, load_signer(sign_key))
        with people(observed.events) as told:
            outcomes = matrices.run_matrix(asked, options, observed, told.say)
        show(matrices.document_of(outcomes, into), as_json, tables.matrix_text)
        matrices.require_built(outcomes)


@app.command()
def plan(
    recipe: RecipeArgument,
    model: ModelOption = None,
    out: OutOption = None,
    target: TargetOption = None,
    verify: VerifyOption = True,
    threads: ThreadsOption = None,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a build would write and need: exact bytes a tensor, disk, peak memory and time. Builds nothing."""
    from tundish import job

    choices = job.Choices(recipe, model, out, target or (), verify, threads, fresh, device=device)
    with people() as watching:
        settled, made = job.plan_job(choices, watching)
    document = {
        "recipe": settled.name,
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "scheme": row.scheme,
                "requested": row.requested,
                "bytes": {target.value: nbytes for target, nbytes in row.nbytes.items()},
            }
            for row in made.rows
        ],
        "targets": {
            target: {
                "bytes": layout.nbytes,
                "files": {name: big.nbytes for name, big in layout.big.items()}
                | {name: len(data) for name, data in layout.small.items()},
                "semantics": made.semantics[target].sentence,
                "differences": [difference.record() for difference in made.differences[target]],
            }
            for target, layout in made.layouts.items()
        },
        "remarks": list(made.remarks),
        "budget": made.assignment and made.assignment.as_dict(),
        "calibration": "cached" if made.cached else None,
        "disk": made.disk,
        "cache": made.kept,
        "peak_memory": dict(made.phases),
        "time": made.time and {part: round(seconds, 3) for part, seconds in made.time.parts().items()},
    }
    show(document, as_json, tables.plan_text)
    if made.shortage is not None:
        raise made.shortage


@app.command()
def verify(
    folder: BuildArgument,
    model: Annotated[
        str | None, typer.Option("--model", help="The checkpoint it was made from. Default: the manifest's.")
    ] = None,
    threads: ThreadsOption = None,
    key: KeyOption = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect",
            metavar="NAME=VALUE",
            help="Only this build will do: recipe=, model= or commit=; may be repeated.",
        ),
    ] = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Check digests and signature, and open no artifact.")
    ] = False,
    events: EventsOption = None,
    metrics: MetricsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the files of an earlier build and its signature, open the artifacts in their runtimes and measure again."""
    from tundish import recheck
    from tundish.expectations import parse_expectations, require_expected, told
    from tundish.integrity import holding_intact
    from tundish.observe import artifact_titles, observing
    from tundish.processors import cores

    expected = parse_expectations(expect or ())
    titles = artifact_titles(folder)
    with figures_of_failed_gates(as_json), observing("verify", titles, events, metrics) as observed:
        with watcher(observed.events) as watching:
            if files_only:
                with holding_intact(folder, threads or cores(), watching.say, key) as intact:
                    watching.say(told(intact))
                    require_expected(folder, intact.manifest, expected)
                    watching.say("files: as they were built; the figures are the build's")
                    manifest = observed.manifest = intact.manifest
            else:
                manifest = observed.manifest = recheck.verify_again(folder, model, threads, watching, key, expected)
        show(manifest, as_json, tables.summary_text)


@app.command()
def sign(
    folder: BuildArgument,
    key: Annotated[
        Path | None, typer.Option("--key", help="A private Ed25519 key, PEM. Default: $TUNDISH_SIGNING_KEY.")
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a build that is there already, after checking its files; an earlier signature is replaced."""
    from tundish.papers import sign_build
    from tundish.processors import cores

    with people() as watching:
        signature = sign_build(folder, key, threads or cores(), watching)
    show({"signature": str(signature)}, as_json, lambda document: f"signed: {document['signature']}")


@app.command()
def push(
    folder: BuildArgument,
    destination: Annotated[str, typer.Argument(metavar="hf://OWNER/NAME[/FOLDER]", help="A model on the Hub.")],
    target: Annotated[
        Target | None, typer.Option("--target", help="Only this container, at the top of the repository.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public. Default: private.")] = False,
    key: KeyOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a build whose gates have all passed on the Hugging Face Hub, in one commit."""
    from tundish.push import Push
    from tundish.push import push as push_build

    with people() as watching:
        document = push_build(Push(folder, destination, target, public, key, threads), watching)
    show(document, as_json, lambda pushed: f"pushed: {pushed['url']}")


@app.command()
def compare(
    artifacts: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Builds, or artifacts of them such as dist/a/gguf.", callback=can_be_looked_at
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="The checkpoint they were made from. Default: the manifest's.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option("--sequences", min=1, help="Texts to read. Default: as the first's recipe.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Tokens of each. Default: as the first's recipe.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", help="A file or folder of text to read, from its beginning. Default: the held-out text."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="A folder for compare.md, and compare.svg: size against KL.", callback=can_be_written
        ),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure artifacts of one checkpoint side by side: size, KL, perplexity, top-1 and speed, in their runtimes."""
    from tundish import comparison

    console.if_interrupted("nothing was compared")
    with people() as watching:
        asked = comparison.Comparison(artifacts, model, text, sequences, length, out, threads)
        document = comparison.compare(asked, watching.say)
    show(document, as_json, tables.comparison_text)
    failure = comparison.failure_of(document)
    if failure is not None:
        raise failure


@app.command()
def imatrix(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.", callback=can_be_written)],
    model: ModelOption = None,
    form: Annotated[
        Literal["gguf", "dat"] | None,
        typer.Option("--format", help="gguf, or dat, the older one. Default: as FILE ends."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write what a recipe's calibration measures as an importance matrix of llama.cpp: llama-quantize takes it."""
    from tundish import importance_matrix, job

    with people() as watching:
        document = importance_matrix.make_imatrix(job.Choices(recipe, model), out, form, watching)
    show(document, as_json, tables.imatrix_text)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="A checkpoint, a build, an artifact folder or a weight file.", callback=can_be_looked_at),
    ],
    as_json: JsonOption = False,
) -> None:
    """List the tensors of a checkpoint or an artifact, a row each."""
    from tundish.inspection import inspect_path

    rows = inspect_path(path)
    document = [
        {
            "file": row.file,
            "name": row.name,
            "type": row.type,
            "shape": list(row.shape),
            "bytes": row.nbytes,
            "shares": row.shares,
        }
        for row in rows
    ]
    show(document, as_json, tables.tensor_text)


@app.command(cls=_Command, options_metavar="[OPTIONS] [NAME]", context_settings={"allow_extra_args": True})
def recipes(
    context: typer.Context,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the recipes, a row each, or show the one called NAME with everything it inherits."""
    name = context.args[0] if context.args else None
    if len(context.args) > 1:
        context.fail(f"Got unexpected extra argument ({' '.join(context.args[1:])})")
    if schema:
        from tundish.recipe import json_schema

        print(json.dumps(json_schema(), indent=2))
    elif name is not None:
        from tundish.recipe import load_recipe, resolved_yaml

        recipe = load_recipe(name)
        show(recipe.model_dump(mode="json", exclude_none=True), as_json, lambda _: resolved_yaml(recipe).rstrip())
    else:
        from tundish.library import summaries

        rows = [
            {
                "name": recipe.name,
                "device": recipe.device,
                "targets": [target.value for target in recipe.targets],
                "scheme": recipe.scheme,
                "context": recipe.context,
                "description": recipe.description.strip(),
            }
            for recipe in summaries()
        ]
        show(rows, as_json, tables.recipes_text)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Show which runtimes are installed, their versions, and what each can do here."""
    from tundish.doctor import examine

    rows = [examination.as_dict() for examination in examine()]
    show(rows, as_json, tables.doctor_text)


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.", callback=can_be_written)],
    as_json: JsonOption = False,
) -> None:
    """Write the small real sample model as a checkpoint: SmolLM2-135M-Instruct in the Phi-3 architecture."""
    from tundish.sample import write_sample

    write_sample(folder)
    show({"folder": str(folder.absolute())}, as_json, lambda _: f"written: {folder}")


cache = typer.Typer(cls=_Group, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache, name="cache", help="What earlier builds left for later ones: calibrations, and the sample.")


@cache.command("ls")
def list_cache(as_json: JsonOption = False) -> None:
    """List what the cache holds, a row each, the last used first."""
    from tundish.cache import entries

    show(tables.cache_rows(entries()), as_json, tables.cache_text)


@cache.command("gc")
def collect_cache(
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", min=0, help="Remove what was last used that long ago.")
    ] = 30,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything, however new.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what was not used for a while. What a build is using stays."""
    from tundish.cache import collect

    def say(text: str) -> None:
        print(terminal(text), file=sys.stderr)

    removed, used = collect(-math.inf if everything else older_than, time.time(), say)
    document = {
        "removed": tables.cache_rows(removed),
        "in_use": tables.cache_rows(used),
        "bytes": sum(e.nbytes for e in removed),
    }
    show(document, as_json, tables.collected_text)


if __name__ == "__main__":
    main()
