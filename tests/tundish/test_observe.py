"""Events and metrics of a command as those who watch it read them, held against what docs/jobs.md says."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from converters.errors import ResourceError, UsageError
from tests.tundish.tiny import QUIET, write_recipe
from tundish import cli
from tundish.events import Events, watching, written
from tundish.gates import FailedGatesError
from tundish.observe import build_titles, observing

pytest.importorskip("prometheus_client")

DOCUMENTED = {
    event: {*keys.replace("`", "").split(), "event", "time"}
    for event, keys in re.findall(
        r"^\| `(?!tundish_)(\w+)` \| ((?:`\w+` ?)+) \|",
        (Path(__file__).resolve().parents[2] / "docs" / "jobs.md").read_text(),
        re.MULTILINE,
    )
}
KL = {"name": "kl", "passed": False, "figure": 0.5, "threshold": 0.1, "detail": "64 positions"}
MANIFEST: dict[str, Any] = {"targets": {"gguf": {"bytes": 10}}, "verification": {"gguf": {"gates": [KL]}}}


def lines_of(text: str) -> list[dict[str, Any]]:
    """The events of a text, each as documented."""
    events = [json.loads(line) for line in text.splitlines()]
    for event in events:
        assert event.keys() == DOCUMENTED[event["event"]], event
        assert datetime.fromisoformat(event["time"]).utcoffset() == timedelta(0)
    return events


def test_all_events_are_documented() -> None:
    assert set(DOCUMENTED) == {
        "started", "message", "phase", "progress", "gate", "published", "source", "cell", "finished", "failed",
    }  # fmt: skip


@pytest.mark.parametrize("place", ["file", "-"])
def test_a_build(
    checkpoint: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Standard output has the result alone, and the events tell the same."""
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}})
    file = str(tmp_path / "events.jsonl") if place == "file" else "-"
    asked = ["build", str(recipe), "--out", str(tmp_path / "out"), "--no-verify", "--json", "--events", file]
    monkeypatch.setattr(sys, "argv", ["tundish", *asked])
    monkeypatch.setenv("TUNDISH_METRICS", str(tmp_path / "m.prom"))
    with pytest.raises(SystemExit) as ending:
        cli.main()
    assert not ending.value.code
    out, err = capfd.readouterr()
    assert json.loads(out)["recipe"]["name"] == "r"
    if place == "file":
        assert f"written: {tmp_path / 'out'}" in err, "people are still told"
    told = lines_of(Path(file).read_text() if place == "file" else err)
    names = [event["event"] for event in told]
    assert names[0] == "started" and names[-1] == "finished" and names.count("published") == 1
    assert (told[0]["command"], told[0]["recipe"], told[0]["model"]) == ("build", "r", checkpoint.name)
    (phase,) = [event for event in told if event["event"] == "phase"]
    progress = [event for event in told if event["event"] == "progress"]
    assert [event["done"] for event in progress][-1] == phase["total"] > 0
    assert {event["phase"] for event in progress} == {phase["phase"]}
    assert next(event for event in told if event["event"] == "published")["out"] == str(tmp_path / "out")
    assert f'tundish_last_run_exit_status{{command="build",model="{checkpoint.name}",recipe="r"}} 0.0' in (
        tmp_path / "m.prom"
    ).read_text(encoding="utf-8")


def missed_gate() -> None:
    raise FailedGatesError(MANIFEST, "verification failed")


def no_disk() -> None:
    raise ResourceError("not enough disk")


def interrupted() -> None:
    raise SystemExit(130)


def crash() -> None:
    raise RuntimeError("a mistake of ours")


@pytest.mark.parametrize(("fails", "status"), [(missed_gate, 4), (no_disk, 5), (interrupted, 130), (crash, 1)])
def test_a_failure_is_told_and_counted(tmp_path: Path, fails: Callable[[], None], status: int) -> None:
    events, metrics = tmp_path / "e.jsonl", tmp_path / "m.prom"
    with pytest.raises(BaseException), observing("build", ("r", "m"), str(events), metrics):  # noqa: B017
        fails()
    told = lines_of(events.read_text())
    gates = [event for event in told if event["event"] == "gate"]
    assert [(gate["gate"], gate["figure"]) for gate in gates] == ([("kl", 0.5)] if fails is missed_gate else [])
    assert told[-1]["event"] == "failed" and told[-1]["status"] == status
    assert (told[-1]["message"] == "interrupted by SIGINT") == (fails is interrupted)
    text = metrics.read_text()
    assert f'tundish_failures_total{{command="build",model="m",recipe="r",status="{status}"}} 1.0' in text
    assert ('tundish_gate_figure{gate="kl"' in text) == (fails is missed_gate)


def test_progress_once_a_second_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tundish.events.monotonic", lambda: now[0])
    told: list[Any] = []
    watcher = watching(Events(told.append), QUIET)
    watcher.start("pouring", 100)
    for _ in range(100):
        now[0] += 0.03
        watcher.advance(1)
    done = [event["done"] for event in told if event["event"] == "progress"]
    assert done == [34, 68, 100]


def test_a_reader_of_events_that_leaves_ends_no_build(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ResourceError, match="not all events"), written("/dev/full") as events:
        events.emit("message", message="a, at https://me:secret@host/")
        events.emit("message", message="b")
    assert capfd.readouterr().err.count("no more events: /dev/full") == 1
    with pytest.raises(UsageError, match="cannot write events"), written(str(tmp_path)):
        pass


def test_events_are_json(tmp_path: Path) -> None:
    file = tmp_path / "e.jsonl"
    with written(str(file)) as events, pytest.raises(ValueError, match="JSON compliant"):
        events.emit("gate", figure=math.nan)
    assert file.read_text() == ""


def test_metrics_that_cannot_be_written_fail_what_else_succeeded(tmp_path: Path) -> None:
    events, metrics = tmp_path / "e.jsonl", tmp_path / "m.prom"
    with pytest.raises(UsageError, match="not a file"), observing("build", ("r", "m"), str(events), metrics):
        metrics.mkdir()
    assert lines_of(events.read_text())[-1]["status"] == 2
    metrics.rmdir()
    with pytest.raises(UsageError, match="mine"), observing("build", ("r", "m"), None, metrics):
        metrics.mkdir()
        raise UsageError("mine")


def test_events_replace_events_alone(tmp_path: Path) -> None:
    file = tmp_path / "e.jsonl"
    for content in ("extends: phi35-mac-int4\n", "{}\n", "[1]\n", "\n", '{"event": "a"}\n', "[" * 100_000):
        file.write_text(content)
        with pytest.raises(UsageError, match="--events holds another file"), written(str(file)):
            pytest.fail("it is told before")
        assert file.read_text() == content
    file.write_text("")
    for text in ("a", "b\udc80"):
        with written(str(file)) as events:
            events.emit("message", message=text)
        assert [event["message"] for event in lines_of(file.read_text())] == [text]
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UsageError, match="not a file"), written(str(path)):
            pytest.fail("it is told before")


def test_metrics_of_others_are_told_before(tmp_path: Path) -> None:
    metrics = tmp_path / "m.prom"
    metrics.write_text("other 1\n")
    with pytest.raises(UsageError, match="found other"), observing("build", ("r", "m"), None, metrics):
        pytest.fail("it is told before")


def test_titles_are_the_same_whatever_happens(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", Path("/models/some model"))
    assert build_titles(str(recipe), None) == ("r", "some model")
    assert build_titles(str(recipe), "org/name") == ("r", "name")
    assert build_titles("./absent.yaml", None) == build_titles("./absent", None) == ("absent", "")
    assert build_titles("absent.yml", "sample") == ("absent", "sample")
    assert build_titles("phi35-mac-int4", "~nobody-of-this-name/x") == ("phi35-mac-int4", "x")
    assert build_titles("phi35-mac-int4", "a\0/x") == ("phi35-mac-int4", "x")
    assert build_titles("phi35-mac-int4", "sample") == ("phi35-mac-int4", "sample")
