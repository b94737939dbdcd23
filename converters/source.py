"""Where a model comes from: a folder, or a repository of the Hugging Face Hub at one pinned commit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from converters.checkpoint import open_checkpoint
from converters.config_keys import shown
from converters.errors import ModelError, TundishError, UsageError
from converters.file_digest import Digests, digesting, sha256_of

CONFIG = "config.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CACHED = re.compile(r"models--.+?--(?P<name>.+)/snapshots/[0-9a-f]{40}")
FOLDER_RULE = "A name is a folder if there is one; otherwise owner/name is a Hub id and anything else a path."


Stamp = Mapping[str, tuple[int, int, int, int]]  # by which a file is seen to have changed, see source_stamp


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
        raise ModelError("no such folder", where=shown(model), found=str(error), mend=FOLDER_RULE) from error
    if is_folder:
        if revision is not None:
            raise UsageError("a folder has no revisions", where=model, found=f"revision {revision}")
        return _local(path)
    if exists:
        mend = "Give the folder of the checkpoint."
        raise ModelError("model is a file", where=model, expected="a checkpoint folder or a Hub id", mend=mend)
    if not _HUB_ID.fullmatch(model):
        raise ModelError("no such folder", where=model, expected="a folder or a Hub id owner/name", mend=FOLDER_RULE)
    from converters.hub import download

    return download(model, revision)


def source_files(folder: Path) -> dict[str, Path]:
    """Every file that a conversion reads, by name: weights, configuration and tokenizer."""
    others = [path for path in folder.iterdir() if path.suffix in (".json", ".jinja")]
    others += [folder / name for name in ("tokenizer.model", "merges.txt")]
    paths = {tensor.path for tensor in open_checkpoint(folder).values()}
    paths |= {path for path in others if path.is_file()}  # no folder, pipe or link that leads nowhere
    return {os.path.relpath(path, folder): path for path in sorted(paths)}


def source_digest(folder: Path, threads: int = 1) -> dict[str, str]:
    """SHA-256 of each of source_files, by name."""
    files = source_files(folder)
    digests = sha256_of(files.values(), threads)
    return {name: digests[path] for name, path in files.items()}


@dataclass(frozen=True, slots=True)
class SourceDigests:
    """SHA-256 of each of source_files, by name, and the stamp that they had before they were read."""

    stamp: Stamp
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Known:
    """Digests that need not be taken, as Digests has them."""

    sha256: Mapping[Path, str]

    def done(self) -> bool:
        """They are."""
        return True

    def result(self) -> dict[Path, str]:
        """Of each file, in hex."""
        return dict(self.sha256)


@contextmanager
def digesting_source(folder: Path, stamp: Stamp, known: SourceDigests | None = None) -> Iterator[Digests | Known]:
    """Take the digests of source_files while the body runs, unless they are known of files with this very stamp."""
    files = source_files(folder)
    if known is not None and known.stamp == stamp:
        yield Known({path: known.sha256[name] for name, path in files.items()})
        return
    with digesting(files.values()) as digests:
        yield digests


def source_stamp(folder: Path) -> Stamp:
    """What the file system says of each of source_files: bytes, nanosecond of the last writing, which file it is, and
    nanosecond of the last change of either its contents or these, which no program can set back."""
    return file_stamp(source_files(folder))


def file_stamp(files: Mapping[str, Path]) -> Stamp:
    """The same of files by name; one that is gone has none."""
    states = {name: path.stat() for name, path in files.items() if path.exists()}
    return {name: (state.st_size, state.st_mtime_ns, state.st_ino, state.st_ctime_ns) for name, state in states.items()}


def require_unchanged(folder: Path, before: Stamp) -> None:
    """ModelError if a file of the checkpoint is not what it was when the stamp was taken."""
    try:
        now = source_stamp(folder)
    except (OSError, ModelError) as error:  # it could be taken before
        raise _changed(str(folder)) from error
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        raise _changed(f"{', '.join(changed[:4])} in {folder}")


@contextmanager
def blaming_changes(folder: Path, before: Stamp) -> Iterator[None]:
    """Where the body fails over a checkpoint that is not what it was, ModelError says that and not what came of it."""
    try:
        yield
    except (OSError, TundishError):
        require_unchanged(folder, before)
        raise


def _changed(where: str) -> ModelError:
    return ModelError(
        "the checkpoint changed while it was read",
        where=where,
        expected="files that stay as they are until the artifacts are verified",
        found="a download or another program changes them",
        mend="Try again when the checkpoint is complete.",
    )


def _local(path: Path) -> Source:
    """A folder is what is in it: anybody can lay out one as the Hub's cache does, which gives a title and proves no
    more than that."""
    folder = path.resolve()
    cached = _CACHED.fullmatch("/".join(folder.parts[-3:]))  # a snapshot's own name is a commit
    return Source(cached["name"] if cached else folder.name, folder)
