"""Where a model comes from: a folder, or a repository of the Hugging Face Hub at one pinned commit."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from converters.checkpoint import open_checkpoint
from converters.config_keys import shown
from converters.errors import ModelError, ResourceError, TundishError, UsageError

# What a conversion reads: no pickles, no code, nothing in subfolders.
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md", "LICENSE*"]
UNWANTED = ["*/*", "consolidated*"]  # consolidated*.safetensors: Mistral's second copy of the weights
CONFIG = "config.json"

_ENDPOINT = re.compile(r"https?://[^/\s]")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]{40})")
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR)
_RULE = "A name is a folder if there is one; otherwise owner/name is a Hub id and anything else a path."


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on disk. `name` is a title for people; models of the Hub have `repo_id` and a commit `revision`."""

    name: str
    folder: Path
    repo_id: str | None = None
    revision: str | None = None


def resolve_source(model: str, revision: str | None = None) -> Source:
    """The checkpoint folder of a path or Hub id; downloads what is not in the Hub's cache.

    `revision` is a branch, tag or commit of a Hub id, its main branch by default. HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME
    and HF_TOKEN work as huggingface_hub documents them. ModelError says what is missing and how to mend it.
    """
    try:
        path = Path(model).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, no permission; the home folder of nobody
        raise ModelError("no such folder", where=shown(model), found=str(error), mend=_RULE) from error
    if is_folder:
        if revision is not None:
            raise UsageError("a folder has no revisions", where=model, found=f"revision {revision}")
        return _local(path)
    if exists:
        mend = "Give the folder of the checkpoint."
        raise ModelError("model is a file", where=model, expected="a checkpoint folder or a Hub id", mend=mend)
    if not _HUB_ID.fullmatch(model):
        raise ModelError("no such folder", where=model, expected="a folder or a Hub id owner/name", mend=_RULE)
    return _download(model, revision)


def source_digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a conversion reads, by name: weights, configuration and tokenizer."""
    others = [path for path in folder.iterdir() if path.suffix in (".json", ".jinja")]
    others += [folder / name for name in ("tokenizer.model", "merges.txt")]
    paths = {tensor.path for tensor in open_checkpoint(folder).values()}
    paths |= {path for path in others if path.is_file()}  # no folder, pipe or link that leads nowhere
    digests: dict[str, str] = {}
    for path in sorted(paths):
        with path.open("rb") as file:
            digests[os.path.relpath(path, folder)] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _local(path: Path) -> Source:
    folder = path.resolve()
    cached = _CACHED.fullmatch("/".join(folder.parts[-3:]))
    if cached:  # a snapshot in the Hub's cache: its own name is a commit
        repo_id = f"{cached['owner']}/{cached['name']}"
        return Source(cached["name"], folder, repo_id, cached["commit"])
    return Source(folder.name, folder)


def _download(repo_id: str, revision: str | None) -> Source:
    """config.json is fetched last: a snapshot that has one is whole, also when there is no Hub to compare it with."""

    if not constants.HF_HUB_OFFLINE and not _ENDPOINT.match(constants.ENDPOINT):
        raise UsageError(
            "the Hub's address is invalid",
            where="HF_ENDPOINT",
            expected="http:// or https:// and a host",
            found=repr(constants.ENDPOINT),
            mend="Unset HF_ENDPOINT for huggingface.co, or set it to the address of a mirror.",
        )

    def fetch(commit: str | None, wanted: list[str], unwanted: list[str]) -> Path:
        return Path(snapshot_download(repo_id, revision=commit, allow_patterns=wanted, ignore_patterns=unwanted))

    try:
        folder = fetch(revision, WANTED, [*UNWANTED, CONFIG])
        fetch(folder.name, [CONFIG], [])
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _explain(error, repo_id, revision) from error
    if not (folder / CONFIG).exists():
        raise ModelError(
            "model is incomplete in the Hub's cache, or has no config.json",
            where=f"{repo_id}, {folder}",
            mend="Run again with the Hub in reach: the download continues where it stopped.",
        )
    return Source(repo_id.split("/")[1], folder, repo_id, folder.name)


def _explain(error: Exception, repo_id: str, revision: str | None) -> TundishError:
    """The error a user can mend for what huggingface_hub raised."""
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return ResourceError(
            "the Hub's cache cannot be written",
            where=constants.HF_HUB_CACHE,
            found=error.strerror,
            mend="Free some space, or set HF_HOME to a folder with enough of it.",
        )
    rows: list[tuple[type[Exception], str, Callable[[], str]]] = [
        (
            GatedRepoError,
            "model is gated on the Hub",
            lambda: f"Accept its terms at {constants.ENDPOINT}/{repo_id} and set HF_TOKEN to a token of that account.",
        ),
        (
            RepositoryNotFoundError,
            "no such folder, and no such model on the Hub",
            lambda: f"{_RULE} A private model needs HF_TOKEN.",
        ),
        (
            RevisionNotFoundError,
            "no such revision of the model",
            lambda: f"{revision!r} is no branch, tag or commit of it.",
        ),
        (LocalEntryNotFoundError, "no such folder, and the model is not in the Hub's cache", _out_of_reach),
        (HFValidationError, "no such folder, and no valid Hub id", lambda: _RULE),
        (HfHubHTTPError, "the Hub refused to serve the model", lambda: "Try again later, or check HF_TOKEN."),
        (OSError, "download broke off", lambda: "Run again: it continues where it stopped."),
    ]
    what, mend = next((what, mend) for kind, what, mend in rows if isinstance(error, kind))
    cause = error.__cause__ or error
    found = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return ModelError(what, where=repo_id, found=found, mend=mend())


def _out_of_reach() -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it to download the model, or give a folder."
    return f"{constants.ENDPOINT} does not answer: check the connection and HF_ENDPOINT, or give a folder."
