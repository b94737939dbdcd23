"""What is known of a dataset of the Hub. Apart from hub_dataset.py, since huggingface_hub is slow to import."""

from __future__ import annotations

from dataclasses import dataclass

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")  # of files that hold text


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset at one commit, `revision`, with the names of its files of text in the order in which they are read."""

    repo_id: str
    revision: str
    files: tuple[str, ...]
