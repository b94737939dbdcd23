"""Checkpoints from the Hugging Face Hub. Apart from source.py, since huggingface_hub is slow to import."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import httpx2
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from converters.errors import ModelError, ResourceError, TundishError, UnreachableError, UsageError
from converters.hub_client import use_bounded_client
from converters.hub_digests import announced_digests
from converters.mask import masked
from converters.other_formats import refuse_other_formats
from converters.source import CONFIG, FOLDER_RULE, Source

# What a conversion reads: no pickles, no code, nothing in subfolders.
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md", "LICENSE*", "NOTICE*"]
UNWANTED = ["*/*", "consolidated*"]  # consolidated*.safetensors: Mistral's second copy of the weights

_ENDPOINT = re.compile(r"https?://[^/\s]")
_SYSTEM_ERROR = re.compile(r"\[Errno -?\d+\] ([\w ]+)")  # as Python words it, within what others made of it
FAILURES = (HfHubHTTPError, HFValidationError, OSError, httpx2.HTTPError, UnreachableError)  # of huggingface_hub
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR)


def download(repo_id: str, revision: str | None) -> Source:
    """config.json is fetched last: a snapshot that has one is whole, also when there is no Hub to compare it with."""
    require_endpoint()

    def fetch(commit: str | None, wanted: list[str], unwanted: list[str], cached: bool) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=commit,
                allow_patterns=wanted,
                ignore_patterns=unwanted,
                local_files_only=cached,
            )
        )

    def fetch_all(cached: bool) -> Path:
        folder = fetch(revision, WANTED, [*UNWANTED, CONFIG], cached)
        fetch(folder.name, [CONFIG], [], cached)
        return folder

    try:
        try:
            folder = fetch_all(cached=False)
        except UnreachableError as unreachable:
            try:
                folder = fetch_all(cached=True)
            except LocalEntryNotFoundError:
                raise unreachable from None
    except FAILURES as error:
        raise explain(error, repo_id, revision) from error
    if not (folder / CONFIG).exists():
        refuse_other_formats(folder)
        raise ModelError(
            "model is incomplete in the Hub's cache, or has no config.json",
            where=f"{repo_id}, {folder}",
            mend="Run again with the Hub in reach: the download continues where it stopped.",
        )
    return Source(repo_id.split("/")[1], folder, repo_id, folder.name, announced_digests(folder))


def require_endpoint() -> None:
    """UsageError if huggingface_hub would be asked to use an address that is none. And bounds for what is asked."""
    use_bounded_client()
    if not constants.HF_HUB_OFFLINE and not _ENDPOINT.match(constants.ENDPOINT):
        raise UsageError(
            "the Hub's address is invalid",
            where="HF_ENDPOINT",
            expected="http:// or https:// and a host",
            found=repr(masked(constants.ENDPOINT)),
            mend="Unset HF_ENDPOINT for huggingface.co, or set it to the address of a mirror.",
        )


def explain(error: Exception, repo_id: str, revision: str | None, kind: str = "model") -> TundishError:
    """The error a user can mend for what huggingface_hub raised about a repository of that kind, model or dataset.

    ModelError for a model. A dataset is a recipe's text like a file of the user's: UsageError.
    """
    if isinstance(error, UnreachableError):
        return error
    is_model = kind == "model"  # only a model's id could have meant a folder
    page = f"{constants.ENDPOINT}/{'' if is_model else 'datasets/'}{repo_id}"
    neither, rule = ("no such folder, and ", f"{FOLDER_RULE} ") if is_model else ("", "")
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return ResourceError(
            "the Hub's cache cannot be written",
            where=constants.HF_HUB_CACHE,
            found=error.strerror,
            mend="Free some space, or set HF_HOME to a folder with enough of it.",
        )
    rows: list[tuple[type[Exception] | tuple[type[Exception], ...], str, Callable[[], str]]] = [
        (
            GatedRepoError,
            f"{kind} is gated on the Hub",
            lambda: f"Accept its terms at {page} and set HF_TOKEN to a token of that account.",
        ),
        (
            RepositoryNotFoundError,
            f"{neither}no such {kind} on the Hub",
            lambda: f"{rule}A private {kind} needs HF_TOKEN.",
        ),
        (
            RevisionNotFoundError,
            f"no such revision of the {kind}",
            lambda: f"{revision!r} is no branch, tag or commit of it.",
        ),
        (LocalEntryNotFoundError, f"{neither}the {kind} is not in the Hub's cache", lambda: _out_of_reach(kind)),
        (HFValidationError, f"{neither}no valid Hub id", lambda: FOLDER_RULE if is_model else "Ids are owner/name."),
        (HfHubHTTPError, f"the Hub refused to serve the {kind}", lambda: "Try again later, or check HF_TOKEN."),
        ((OSError, httpx2.HTTPError), "download broke off", lambda: "Run again: it continues where it stopped."),
    ]
    what, mend = next((what, mend) for failure, what, mend in rows if isinstance(error, failure))
    kind_of_error: type[TundishError] = ModelError if is_model else UsageError
    if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, (HfHubHTTPError, HFValidationError)):
        kind_of_error = kind_of_error if constants.HF_HUB_OFFLINE else UnreachableError
    return kind_of_error(what, where=repo_id, found=_reason(error), mend=mend())


def _reason(error: Exception) -> str:
    """What went wrong in a few words: those of huggingface_hub and requests have objects and addresses in them."""
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    if response is not None:
        return f"HTTP status {response.status_code} {response.reason_phrase}".rstrip()
    text = str(cause).strip()
    if "timed out" in text:
        return "no answer in time"
    if told := _SYSTEM_ERROR.search(text):
        return told[1].strip()
    return (text.splitlines() or [type(cause).__name__])[0]


def _out_of_reach(kind: str) -> str:
    other = "a folder" if kind == "model" else "a text of your own"
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set: unset it to download the {kind}, or give {other}."
    return f"{constants.ENDPOINT} does not answer: check the connection and HF_ENDPOINT, or give {other}."
