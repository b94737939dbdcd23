"""Publishes a build on the Hugging Face Hub, in one commit, and looks whether everything arrived."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import GateError, ResourceError, TundishError, UnreachableError, UsageError
from converters.mask import masked
from exporters.target import Target
from tundish.expectations import told
from tundish.integrity import Intact, holding_intact
from tundish.manifest_file import PROVENANCE, SIGNATURE
from tundish.processors import cores
from tundish.provenance import subjects
from tundish.watcher import Watcher

_DESTINATION = re.compile(r"hf://(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?P<folder>(?:/[^/\s]+)*)/?")
_AT_ONCE = 256  # paths that the Hub is asked about in a request


@dataclass(frozen=True, slots=True)
class Push:
    """What the command line says. `key`: a public key that the build must be signed with."""

    folder: Path
    destination: str
    target: Target | None = None
    public: bool = False
    key: Path | None = None
    threads: int | None = None


def push(asked: Push, watcher: Watcher) -> dict[str, Any]:
    """Upload a build, or one container of it as a repository of its own; the document that --json prints.

    A push that was interrupted goes on: what the Hub has of large files is not sent again, and nothing is visible until
    the commit. Files of an earlier push of tundish that this push has not are removed by the same commit; any others
    stay. GateError unless the files are as they were built and every gate has passed.
    """
    repo, folder = _destination(asked.destination)
    with holding_intact(asked.folder, asked.threads or cores(), watcher.say, asked.key) as intact:
        watcher.say(told(intact))
        _require_passed(intact.manifest, asked)
        return _push(asked, intact, repo, folder, watcher)


def _push(asked: Push, intact: Intact, repo: str, folder: str, watcher: Watcher) -> dict[str, Any]:
    files = _files(asked, intact.digests)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from converters.hub import require_endpoint

    require_endpoint()
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="tundish", library_version=intact.manifest["tundish"])
    additions = {folder + name: CommitOperationAdd(folder + name, str(path)) for name, (path, _) in files.items()}
    for name, (_, sha256) in files.items():
        if additions[folder + name].upload_info.sha256.hex() != sha256:
            raise GateError("a file changed while it was pushed", where=name, mend="Push again.")
    with _explained(repo):
        api.create_repo(repo, private=not asked.public, exist_ok=True)
        head = api.repo_info(repo)
        stale = _stale(api, repo, head, folder) - set(additions)
        nbytes = sum(operation.upload_info.size for operation in additions.values())
        watcher.say(f"pushing {len(files)} files, {nbytes:,} bytes, to {repo}")
        commit = api.create_commit(
            repo,
            [*additions.values(), *(CommitOperationDelete(name) for name in sorted(stale))],
            commit_message=f"{intact.manifest['recipe']['name']}, by tundish {intact.manifest['tundish']}",
            parent_commit=head.sha,  # somebody else's push since then may have brought files that are not removed here
        )
        watcher.published(asked.folder)
        arrived = _infos(api, repo, commit.oid, list(additions))
    missing = sorted(name for name, operation in additions.items() if not _same(operation, arrived.get(name)))
    if missing:
        raise ResourceError(
            "not everything arrived on the Hub",
            where=f"{repo} at {commit.oid}",
            found=", ".join(missing[:5]),
            mend="See whether a .gitignore there leaves them out, and push again.",
        )
    return {
        "repo": repo,
        "commit": commit.oid,
        "url": masked(f"{api.endpoint}/{repo}/tree/main/{folder}".rstrip("/")),
        "files": list(additions),
        "removed": sorted(stale),
    }


def _destination(text: str) -> tuple[str, str]:
    """Id of the repository, and the folder in it with a slash at its end, or nothing."""
    found = _DESTINATION.fullmatch(text)
    parts = found["folder"].strip("/").split("/") if found else []
    if found is None or {".", ".."} & {*parts} or ".git" in parts:
        raise UsageError("no place on the Hub", where=text, expected="hf://OWNER/NAME or hf://OWNER/NAME/FOLDER")
    return found["repo"], "".join(f"{part}/" for part in parts if part)


def _require_passed(manifest: dict[str, Any], asked: Push) -> None:
    """GateError unless every container that goes out was verified, and passed."""
    targets = manifest["targets"] if asked.target is None else [asked.target.value]
    unknown = [target for target in targets if target not in manifest["targets"]]
    if unknown:
        raise UsageError("the build has no such container", found=unknown[0], expected=", ".join(manifest["targets"]))
    verification = manifest["verification"] or {}
    failed = [
        f"{target} {'missed its gates' if verification.get(target, {}).get('passed') is False else 'was not verified'}"
        for target in targets
        if verification.get(target, {}).get("passed") is not True
    ]
    if failed:
        raise GateError(
            "only what passed its gates is pushed",
            where=str(asked.folder),
            found=", ".join(failed),
            mend="`tundish verify` verifies a build; --target pushes one container.",
        )


def _files(asked: Push, digests: Mapping[str, str]) -> dict[str, tuple[Path, str]]:
    """Path and SHA-256 of each file by its name on the Hub. One container goes with the provenance, if not the rest."""
    start = "" if asked.target is None else f"{asked.target}/"
    return {
        name.removeprefix(start): (asked.folder / name, digest)
        for name, digest in sorted(digests.items())
        if name.startswith(start) or name in (PROVENANCE, SIGNATURE)
    }


def _stale(api: Any, repo: str, head: Any, folder: str) -> set[str]:
    """Files of an earlier push to the same place. Its provenance names those of the whole build, whether all of it was
    pushed or one container: what was is told by a large file, which nobody else has. The rest of the names, such as
    config.json, may be others' at the top of a repository.
    """
    present = {file.rfilename for file in head.siblings or ()}
    if folder + PROVENANCE not in present:
        return set()
    path = Path(api.hf_hub_download(repo, folder + PROVENANCE, revision=head.sha))
    earlier = subjects(path.read_bytes()) or {}
    ours = {folder + SIGNATURE}
    for start in ("", *(f"{target}/" for target in Target)):
        names = {
            folder + name.removeprefix(start): sha256 for name, sha256 in earlier.items() if name.startswith(start)
        }
        there = _infos(api, repo, head.sha, sorted(names.keys() & present))
        if any(info.lfs is not None and info.lfs.sha256 == names[name] for name, info in there.items()):
            ours |= names.keys()
    return ours & present


def _infos(api: Any, repo: str, commit: str, names: list[str]) -> dict[str, Any]:
    """What the Hub says of each file at a commit."""
    parts = (names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE))
    return {info.path: info for part in parts for info in api.get_paths_info(repo, part, revision=commit)}


def _same(operation: Any, info: Any) -> bool:
    """Whether a file on the Hub is the one that was checked, by SHA-256 if it is large, by git's SHA-1 if not."""
    if info is None or info.size != operation.upload_info.size:
        return False
    if info.lfs is not None:
        return bool(info.lfs.sha256 == operation.upload_info.sha256.hex())
    data = Path(operation.path_or_fileobj).read_bytes()
    if hashlib.sha256(data).digest() != operation.upload_info.sha256:
        return False
    return bool(info.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What huggingface_hub raises, as an error that a user can mend. It never shows a token."""
    from converters.hub import FAILURES

    try:
        yield
    except TundishError:
        raise
    except (*FAILURES, RuntimeError, ValueError) as error:
        raise _explain(error, repo) from error


def _explain(error: Exception, repo: str) -> TundishError:
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    cause: BaseException = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # of one of the uploads
        cause = cause.__cause__
    if isinstance(cause, TundishError):
        return cause
    found = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    found = re.sub(r"\?\S+", "", found)  # addresses of uploads have keys behind them
    if token := get_token():
        found = found.replace(token, "…")
    if isinstance(cause, HFValidationError):
        return UsageError("no valid Hub id", where=repo, found=found, mend="Ids are OWNER/NAME.")
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) and cause.response is not None else None
    if status in (401, 403, 404):
        return UsageError(
            "the Hub does not let this account write there",
            where=repo,
            found=found,
            mend="Log in with `hf auth login`, or set HF_TOKEN to a token that may write to the repository.",
        )
    if status is not None:
        return ResourceError("the Hub refused the push", where=repo, found=found, mend="Push again; it goes on.")
    return UnreachableError(
        "the push broke off",
        where=f"{repo} on {constants.ENDPOINT}",
        found=found,
        mend="See whether the Hub can be reached (HF_ENDPOINT), and push again: what has arrived is not sent twice.",
    )
