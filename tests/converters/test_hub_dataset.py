"""Datasets of the Hub by its protocol, each in a process of its own: files of text, one by one, at one commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import Hub, Repo, serve

REPO_ID = "acme/prose"
COMMIT = Repo({}).commit
FILES = {
    "README.md": b"# About",
    "dataset_infos.json": b"{}",
    "data/train-1.jsonl": b'{"text": "second"}',
    "data/train-0.jsonl": b'{"text": "first"}',
    "data/test-0.jsonl": b'{"text": "held out"}',
    "image.png": b"png",
}
PLAIN = {"b.txt": b"second", "a.md": b"first", ".hidden.txt": b"no"}

SCRIPT = """
import json, sys
from converters.errors import TundishError
from converters.hub_dataset import fetch, find_dataset
try:
    dataset = find_dataset(*[each or None for each in sys.argv[1:4]])
    texts = [fetch(dataset, name).read_text() for name in dataset.files[: int(sys.argv[4])]]
except TundishError as error:
    print(json.dumps(f"{error} Exit status {error.exit_status}."))
else:
    print(json.dumps([dataset.repo_id, dataset.revision, dataset.files, texts]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    repos = {
        f"datasets/{REPO_ID}": Repo(dict(FILES)),
        "datasets/acme/plain": Repo(dict(PLAIN)),
        "datasets/acme/images": Repo({"image.png": b"png"}),
        "datasets/acme/gated": Repo(dict(FILES), token="secret"),
    }
    with serve(Hub(repos)) as running:
        yield running


def find(
    home: Path, url: str, repo_id: str, revision="", pattern="", count=9, **environment: str
) -> list[object] | str:
    """What the script prints: id, commit, names and the first files' contents, or the error's message."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, repo_id, revision, pattern, str(count)],
        env=kept | settings,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result: list[object] | str = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_training_split_in_the_order_of_names_and_only_what_is_read(hub: Hub, tmp_path: Path) -> None:
    names = ["data/train-0.jsonl", "data/train-1.jsonl"]
    texts = [FILES[name].decode() for name in names]
    assert find(tmp_path, hub.url, REPO_ID, count=1) == [REPO_ID, COMMIT, names, texts[:1]]
    assert not [request for request in hub.requests if "train-1" in request or "test-0" in request]
    assert find(tmp_path, hub.url, REPO_ID, COMMIT) == [REPO_ID, COMMIT, names, texts]
    seen = len(hub.requests)
    for url, environment in ((hub.url, {"HF_HUB_OFFLINE": "1"}), ("http://127.0.0.1:9", {})):
        assert find(tmp_path, url, REPO_ID, **environment) == [REPO_ID, COMMIT, names, texts]
    assert len(hub.requests) == seen


def test_patterns_and_datasets_without_splits(hub: Hub, tmp_path: Path) -> None:
    held_out = ["data/test-0.jsonl"]
    assert find(tmp_path, hub.url, REPO_ID, "main", "data/test-*")[2] == held_out
    assert find(tmp_path, hub.url, "acme/plain")[2:] == [["a.md", "b.txt"], ["first", "second"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["acme/nothing"], "no such dataset on the Hub (acme/nothing)"),
        ([REPO_ID, "v9"], "no such revision of the dataset"),
        (["acme/images"], "found image.png"),
        ([REPO_ID, "main", "*.parquet"], "like *.parquet"),
        (["not an id"], "no valid Hub id"),
    ],
)
def test_what_cannot_be_had(hub: Hub, tmp_path: Path, arguments: list[str], message: str) -> None:
    told = find(tmp_path, hub.url, *arguments)
    assert message in told and "Exit status 2." in told, "a text of the recipe's, not a model"


def test_gated_and_cut_off(hub: Hub, tmp_path: Path) -> None:
    assert f"{hub.url}/datasets/acme/gated" in find(tmp_path, hub.url, "acme/gated")
    assert find(tmp_path, hub.url, "acme/gated", HF_TOKEN="secret")[1] == COMMIT
    hub.cut["data/train-0.jsonl"] = 5
    assert "download broke off" in find(tmp_path, hub.url, REPO_ID)


def test_offline_and_not_cached(tmp_path: Path) -> None:
    message = find(tmp_path, "http://127.0.0.1:9", REPO_ID, HF_HUB_OFFLINE="1")
    assert "not in the Hub's cache" in message and "HF_HUB_OFFLINE is set" in message


def test_out_of_reach_is_told_in_words(tmp_path: Path) -> None:
    assert find(tmp_path, "http://127.0.0.1:9", REPO_ID) == (
        f"the dataset is not in the Hub's cache ({REPO_ID}); found Connection refused. http://127.0.0.1:9 does not "
        "answer: check the connection and HF_ENDPOINT, or give a text of your own. Exit status 6."
    )
