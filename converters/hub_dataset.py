"""Files of text from datasets of the Hugging Face Hub, fetched one by one as they are read."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import httpx2
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from converters.dataset import SUFFIXES, Dataset
from converters.errors import UnreachableError, UsageError
from converters.hub import FAILURES, explain, require_endpoint

ABOUT = ("readme", "license", "dataset_info", "dataset_infos", "state")  # stems of files about a dataset


def fetch(dataset: Dataset, name: str) -> Path:
    """The file of that name, downloaded unless it is in the Hub's cache. UsageError says why it cannot be had."""
    try:
        return Path(hf_hub_download(dataset.repo_id, name, repo_type="dataset", revision=dataset.revision))
    except FAILURES as error:
        raise explain(error, dataset.repo_id, dataset.revision, "dataset") from error


def find_dataset(repo_id: str, revision: str | None = None, pattern: str | None = None) -> Dataset:
    """The dataset at a branch, tag or commit, by default its main branch; downloads no text yet.

    `pattern` chooses files, such as "data/train-*.parquet"; by default those of the training split, if names tell it,
    and all others otherwise. Without the Hub in reach, the files are those in its cache. UsageError if there are none.
    """
    require_endpoint()
    try:
        # Resolves the revision, and remembers it for when the Hub is not in reach.
        folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=["README.md"]))
        names = _names(repo_id, folder)
    except FAILURES as error:
        raise explain(error, repo_id, revision, "dataset") from error
    readable = [name for name in sorted(names) if _is_text(name)]
    if pattern is not None:
        chosen = [name for name in readable if fnmatch(name, pattern)]
    else:
        chosen = [name for name in readable if "train" in name.lower()] or readable
    if not chosen:
        raise UsageError(
            "the dataset has no text that can be read",
            where=f"{repo_id}, revision {folder.name}",
            expected=f"files *{', *'.join(SUFFIXES)}" + ("" if pattern is None else f" like {pattern}"),
            found=", ".join(sorted(names)[:6]) or "no files",
            mend="Take another dataset or revision, or download it and give a file of text.",
        )
    return Dataset(repo_id, folder.name, tuple(chosen))


def _names(repo_id: str, folder: Path) -> list[str]:
    """Of the dataset's files on the Hub; of those in the cache, where snapshot_download had to make do with it too."""
    try:
        info = HfApi().dataset_info(repo_id, revision=folder.name)
    except HfHubHTTPError:
        raise
    except (OSError, httpx2.HTTPError, UnreachableError):  # out of reach
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [sibling.rfilename for sibling in info.siblings or []]


def _is_text(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in SUFFIXES and path.stem.lower() not in ABOUT and not path.name.startswith(".")
