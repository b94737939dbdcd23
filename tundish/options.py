"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from converters.errors import UsageError
from exporters.target import Target
from tundish.user_path import require_output


def can_be_looked_at(given: Path | list[Path]) -> Path | list[Path]:
    """Paths that a command is to read. UsageError for what no file can be called, or nobody lets us see."""
    for path in given if isinstance(given, list) else [given]:
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass  # the command says what it misses there
        except OSError as error:
            raise UsageError("cannot look at the path", where=str(path), found=error.strerror or str(error)) from error
    return given


def can_be_written(given: Path | str | None) -> Path | str | None:
    """Paths that a command is to write. UsageError for what `require_output` refuses."""
    if given is not None:
        require_output(Path(given))
    return given


RecipeArgument = Annotated[str, typer.Argument(help="A recipe's name (see `tundish recipes`) or a YAML file.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="A checkpoint folder, a Hub id, or `sample`. Default: the recipe's own.")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="The folder to write. Default: dist/<recipe name>.", callback=can_be_written),
]
TargetOption = Annotated[list[Target] | None, typer.Option("--target", help="Only this container; may be repeated.")]
VerifyOption = Annotated[bool, typer.Option("--verify/--no-verify", help="Verify before publishing.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads. Default: as many as cores.")]
BuildArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that `tundish build` wrote.", callback=can_be_looked_at)
]
KeyOption = Annotated[Path | None, typer.Option("--key", help="Check the signature with this public Ed25519 key, PEM.")]
SignKeyOption = Annotated[
    Path | None,
    typer.Option("--sign-key", help="Sign with the Ed25519 key in this PEM file. Default: $TUNDISH_SIGNING_KEY."),
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Calibrate anew, and find anew what matrices cost, even if the cache has it.")
]
EventsOption = Annotated[
    str | None,
    typer.Option(
        "--events",
        metavar="FILE",
        help="Write progress there, a JSON object a line; - is stderr.",
        callback=can_be_written,
    ),
]
MetricsOption = Annotated[
    Path | None,
    typer.Option(
        "--metrics",
        metavar="FILE",
        envvar="TUNDISH_METRICS",
        help="A Prometheus textfile to write, .prom.",
        callback=can_be_written,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="Where torch, if installed, computes a calibration: cuda, mps, cpu. Default: numpy."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
