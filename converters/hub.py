"""Checkpoints from the Hugging Face Hub. Apart from source.py, since huggingface_hub is slow to import."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
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

from converters.errors import ModelError, ResourceError, TundishError, UsageError
from converters.source import CONFIG, FOLDER_RULE, Source

# What a conversion reads: no pickles, no code, nothing in subfolders.
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md", "LICENSE*"]
UNWANTED = ["*/*", "consolidated*"]  # consolidated*.safetensors: Mistral's second copy of the weights

_ENDPOINT = re.compile(r"https?://[^/\s]")
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR)


def download(repo_id: str, revision: str | None) -> Source:
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
            lambda: f"{FOLDER_RULE} A private model needs HF_TOKEN.",
        ),
        (
            RevisionNotFoundError,
            "no such revision of the model",
            lambda: f"{revision!r} is no branch, tag or commit of it.",
        ),
        (LocalEntryNotFoundError, "no such folder, and the model is not in the Hub's cache", _out_of_reach),
        (HFValidationError, "no such folder, and no valid Hub id", lambda: FOLDER_RULE),
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
