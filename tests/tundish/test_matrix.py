"""Matrices built for real: on this machine, and by a scheduler of Dask with two workers of which one is killed.

How often a source is read for its digests is not taken from what tundish says: every process notes it by an audit hook.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from converters.errors import UsageError
from tests.tundish.keys import write_keys
from tests.tundish.tiny import INT4, QUIET, write_recipe, write_tiny_phi3
from tundish import cli, matrix, matrix_cluster, matrix_worker
from tundish.events import Events
from tundish.integrity import Signature, require_intact
from tundish.matrix_file import load_matrix
from tundish.observe import Observed
from tundish.watcher import Watcher

pytest.importorskip("distributed")

ROOT = Path(__file__).resolve().parents[2]
OFF = {"enabled": False}
# Python runs this at its start. A file is read for its digest where the function opens it unbuffered.
NOTE_READS = """
import os, sys

def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".safetensors"):
        frame = sys._getframe(1)
        if frame.f_code.co_name == "open":
            frame = frame.f_back
        if frame.f_code.co_name == "_sha256":
            with open(os.environ["READS"], "a") as log:
                log.write(f"{os.getppid()} {os.path.realpath(arguments[0])}\\n")

sys.addaudithook(note)
"""


@dataclass(frozen=True)
class Place:
    """A folder for one test, and the environment of all its processes."""

    folder: Path
    environment: dict[str, str]

    @property
    def reads(self) -> Counter[tuple[int, str]]:
        """How often each file was read for its digest, by the process that started the one that did."""
        log = Path(self.environment["READS"])
        lines = log.read_text().splitlines() if log.exists() else []
        return Counter((int(line.split(" ", 1)[0]), line.split(" ", 1)[1]) for line in lines)

    def matrix(self, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tundish", "matrix", str(self.folder / "m.yaml"), *map(str, arguments)]
        return self.start(*command)

    def start(self, *command: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOTE_READS)
    paths = [str(tmp_path / "site"), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    mine = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "READS": str(tmp_path / "reads"),
        "TUNDISH_CACHE": str(tmp_path / "cache"),
    }
    return Place(tmp_path, os.environ | mine)


def write_matrix(folder: Path, models: list[Path], recipes: dict[str, dict[str, Any]]) -> None:
    for name, changes in recipes.items():
        write_recipe(folder / f"{name}.yaml", models[0], **{"targets": {"gguf": {}}, **changes})
    document = {"models": list(map(str, models)), "recipes": [str(folder / f"{name}.yaml") for name in recipes]}
    (folder / "m.yaml").write_text(json.dumps(document | {"out": str(folder / "out")}))


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def results(document: dict[str, Any]) -> dict[str, tuple[str, int]]:
    return {f"{cell['model']}/{cell['recipe']}": (cell["result"], cell["status"]) for cell in document["cells"]}


def test_cells_are_built_then_reused(place: Place, checkpoint: Path) -> None:
    """A model that cannot be read fails alone; what is damaged is built anew, what is not is not; both get signed."""
    folder = place.folder
    (folder / "broken").mkdir()
    write_matrix(
        folder, [checkpoint, folder / "broken"], {"int4": {"schemes": INT4, "verify": OFF}, "fp32": {"verify": OFF}}
    )
    asked = ("--json", "--events", folder / "events.jsonl", "--metrics", folder / "m.prom", "--threads", 1)
    first = place.matrix(*asked)
    out, err = first.communicate(timeout=240)
    title = checkpoint.name
    assert first.returncode == 3, err
    assert err.splitlines()[-1].startswith("tundish: 2 of 4 builds failed")
    assert results(json.loads(out)) == {
        f"{title}/int4": ("built", 0), f"{title}/fp32": ("built", 0),
        "broken/int4": ("failed", 3), "broken/fp32": ("failed", 3),
    }  # fmt: skip
    shards = sorted(str(path.resolve()) for path in checkpoint.glob("*.safetensors"))
    assert len(shards) > 1 and sorted(path for _, path in place.reads.elements()) == shards, "each is read once"
    told = place.events()
    assert [event["event"] for event in told if event["event"] in ("started", "failed")] == ["started", "failed"]
    assert {event["recipe"] for event in told if event["event"] == "published"} == {"int4", "fp32"}
    assert (
        'tundish_failures_total{command="build",model="broken",recipe="int4",status="3"} 1'
        in (folder / "m.prom").read_text()
    )

    artifact = folder / "out" / title / "int4" / "gguf" / "model.gguf"
    data = bytearray(artifact.read_bytes())
    data[-1] ^= 1
    artifact.write_bytes(data)
    kept = (folder / "out" / title / "fp32" / "manifest.json").stat().st_ino
    private = write_keys(folder, "key")
    second = place.matrix(*asked, "--sign-key", private)
    out, err = second.communicate(timeout=240)
    assert results(json.loads(out))[f"{title}/int4"] == ("built", 0), err
    assert results(json.loads(out))[f"{title}/fp32"] == ("reused", 0)
    why = {cell["recipe"]: cell["message"] for cell in json.loads(out)["cells"] if cell["model"] == title}
    assert why["int4"].startswith("the build there is damaged: ") and why["fp32"] == ""
    assert (folder / "out" / title / "fp32" / "manifest.json").stat().st_ino == kept
    data[-1] ^= 1
    assert artifact.read_bytes() == data, "the same bytes as before"
    for name in ("int4", "fp32"):
        assert require_intact(folder / "out" / title / name, 1, folder / "key.pub").signature is Signature.VALID


def test_what_ended_before_an_interrupt_is_in_the_metrics(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = matrix_worker.Answer(3, "no model", {}, "here", 0.0)
    monkeypatch.setattr(matrix_worker, "_run", lambda *arguments: answer)

    @contextmanager
    def interrupting(events: Events) -> Iterator[Watcher]:
        def say(text: str) -> None:
            sys.exit(128 + signal.SIGINT)  # as tundish.signals has it

        yield replace(QUIET, say=say)

    monkeypatch.setattr(cli, "people", interrupting)
    write_matrix(tmp_path, [checkpoint], {"a": {}, "b": {}})
    metrics = tmp_path / "m.prom"
    monkeypatch.setattr(sys, "argv", ["tundish", "matrix", str(tmp_path / "m.yaml"), "--metrics", str(metrics)])
    with pytest.raises(SystemExit):
        cli.main()
    failures = [line for line in metrics.read_text().splitlines() if line.startswith("tundish_failures_total{")]
    assert len(failures) == 2
    assert 'command="build"' in failures[0] and 'recipe="a",status="3"} 1' in failures[0]
    assert 'command="matrix"' in failures[1] and 'status="130"} 1' in failures[1]


def test_surveys_keep_to_the_memory(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = list[str](), list[int]()

    def surveyed(asked: matrix_worker.Asked, *others: object) -> matrix_worker.Answer:
        running.append(asked.model)
        most.append(len(running))
        time.sleep(0.3)
        running.remove(asked.model)
        return matrix_worker.Answer(3, "no model", {}, "here", 0.0)

    monkeypatch.setattr(matrix_worker, "_run", surveyed)
    monkeypatch.setattr("dask.system.CPU_COUNT", 2)
    (tmp_path / "other").mkdir()
    write_matrix(tmp_path, [checkpoint, tmp_path / "other"], {"a": {}})
    for memory, together in ((3 << 30, 2), (1 << 30, 1), (1 << 20, 1)):
        most.clear()
        options = matrix.Options(tmp_path / "out", memory=memory)
        observed = Observed(Events(lambda event: None))
        outcomes = matrix.run_matrix(load_matrix(tmp_path / "m.yaml"), options, observed, lambda text: None)
        assert [outcome.status for outcome in outcomes] == [3, 3] and max(most) == together


@pytest.mark.slow
def test_an_interrupt_ends_every_child(place: Place, checkpoint: Path) -> None:
    write_matrix(place.folder, [checkpoint], {"a": {}, "b": {"context": 256}})
    process = place.matrix("--events", place.folder / "events.jsonl")
    until(lambda: (place.folder / "events.jsonl").exists())
    until(lambda: len({event.get("recipe") for event in place.events() if event["event"] == "phase"}) == 2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "tundish: interrupted; what was built by then is published" in err
    assert "Traceback" not in err
    assert time.monotonic() - begun < 20
    assert not [child for child in children if child.is_running()]
    left = list((place.folder / "out").rglob(".*"))
    assert all((path / "journal").is_file() for path in left), "nothing but what the same command goes on from"
    assert place.events()[-1]["status"] == 130


@pytest.mark.slow
def test_a_build_that_is_killed_is_tried_again(place: Place, checkpoint: Path) -> None:
    """As the system does it for want of memory."""
    write_matrix(place.folder, [checkpoint], {"a": {}})
    process = place.matrix("--events", place.folder / "events.jsonl")

    def pouring() -> int:
        path = place.folder / "events.jsonl"
        return sum(event["event"] == "phase" for event in place.events()) if path.exists() else 0

    until(pouring)
    (child,) = psutil.Process(process.pid).children()
    child.kill()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "1 built" in out and pouring() == 2


# ---- a cluster ----


@pytest.fixture
def cluster(place: Place) -> Iterator[tuple[str, Callable[..., subprocess.Popen[str]]]]:
    """A scheduler's address, and what starts a worker of it."""
    file = place.folder / "scheduler.json"
    local = ("--host", "127.0.0.1")
    cli = "distributed.cli.dask_"
    started = [
        place.start(
            sys.executable,
            "-m",
            f"{cli}scheduler",
            *local,
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            str(file),
        )
    ]
    until(lambda: file.exists() and file.read_text().rstrip().endswith("}"))
    address = json.loads(file.read_text())["address"]

    def worker(*arguments: str) -> subprocess.Popen[str]:
        command = (sys.executable, "-m", f"{cli}worker", address, *local, "--no-nanny", "--no-dashboard", *arguments)
        started.append(place.start(*command, "--nthreads", "1", "--local-directory", str(place.folder)))
        return started[-1]

    yield address, worker
    for process in reversed(started):
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_is_killed_midway(place: Place, checkpoint: Path, cluster: Any) -> None:
    """Two models, four recipes, two of which share a calibration: all complete, and no worker reads a source twice."""
    address, worker = cluster
    folder = place.folder
    other = write_tiny_phi3(folder / "other")
    (other / "note.json").write_text("{}")  # else it would be the same model, whose calibration is there
    gptq = {"schemes": INT4, "method": "gptq", "calibration": {"source": "text", "sequences": 4, "length": 64}}
    write_matrix(folder, [checkpoint, other], {
        "int4": {"schemes": INT4, "verify": OFF},
        "int8": {"schemes": {"default": "int8_g32"}, "verify": OFF},
        "gptq": {**gptq, "verify": OFF},
        "gptq-too": {**gptq, "verify": OFF, "targets": {"gguf": {}, "mlx": {}}},
    })  # fmt: skip
    workers = [worker("--resources", "MEMORY=8e9") for _ in range(2)]
    process = place.matrix("--scheduler", address, "--json", "--events", folder / "events.jsonl")

    def busy() -> set[str]:
        """Workers that are in the middle of a build, after two builds are done."""
        told = place.events() if (folder / "events.jsonl").exists() else []
        if sum(event["event"] == "cell" for event in told) < 2:
            return set()
        ended = {(event["model"], event["recipe"]) for event in told if event["event"] == "cell"}
        middle = [event for event in told if event["event"] == "phase"]
        return {event["worker"] for event in middle if (event["model"], event["recipe"]) not in ended}

    until(busy, 240)
    lost = busy().pop()
    victim = next(each for each in workers if lost in {f"tcp://{c.laddr.ip}:{c.laddr.port}" for c in _listening(each)})
    children = psutil.Process(victim.pid).children(recursive=True)
    assert children, "it is in the middle of a build"
    victim.kill()
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    document = json.loads(out)
    assert set(results(document).values()) == {("built", 0)} and len(document["cells"]) == 8
    assert not [child for child in children if child.is_running()], "a lost worker's children end"
    counts = place.reads
    assert set(counts.values()) == {1}, "no worker has read a file twice"
    assert {path for _, path in counts} == {
        str(p.resolve()) for m in (checkpoint, other) for p in m.glob("*.safetensors")
    }
    assert {pid for pid, _ in counts} <= {each.pid for each in workers}
    entries = [path for path in (folder / "cache" / "calibrations").iterdir() if not path.name.startswith(".")]
    assert len(entries) == 2, "one of each model"
    said = [event["message"] for event in place.events() if event["event"] == "message"]
    assert sum(text.startswith("calibration: cached") for text in said) >= 2
    for cell in document["cells"]:
        manifest = json.loads((Path(cell["out"]) / "manifest.json").read_text())
        assert manifest["recipe"]["name"] == cell["recipe"]


def _listening(process: subprocess.Popen[str]) -> list[Any]:
    connections = psutil.Process(process.pid).net_connections("tcp")
    return [connection for connection in connections if connection.status == psutil.CONN_LISTEN]


@pytest.mark.slow
def test_a_client_that_is_gone_leaves_no_build(place: Place, checkpoint: Path, cluster: Any) -> None:
    address, worker = cluster
    write_matrix(place.folder, [checkpoint], {"a": {}})
    working = psutil.Process(worker("--resources", "MEMORY=8e9").pid)
    for number in (signal.SIGINT, signal.SIGKILL):
        process = place.matrix("--scheduler", address, "--events", place.folder / "events.jsonl")
        until(lambda: "phase" in (place.folder / "events.jsonl").read_text() if working.children() else False)
        process.send_signal(number)
        process.communicate(timeout=30)
        until(lambda: not working.children(recursive=True), 30)
        left = list((place.folder / "out").rglob("*.partial"))
        assert all((path / "journal").is_file() for path in left), "nothing but what the same command goes on from"
        (place.folder / "events.jsonl").unlink()


@pytest.mark.slow
def test_workers_that_will_not_do(place: Place, checkpoint: Path, cluster: Any) -> None:
    address, worker = cluster
    write_matrix(place.folder, [checkpoint], {"int4": {"schemes": INT4, "verify": OFF}})
    worker()
    refused = place.matrix("--scheduler", address)
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "no worker declares its memory" in err and "--resources MEMORY=" in err
    worker("--resources", "MEMORY=1e6")
    small = place.matrix("--scheduler", address, "--json")
    out, err = small.communicate(timeout=120)
    assert small.returncode == 5, err
    assert "not enough memory; expected a worker with " in json.loads(out)["cells"][0]["message"]


def test_no_scheduler(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_matrix(tmp_path, [checkpoint], {"int4": {"schemes": INT4, "verify": OFF}})
    monkeypatch.setattr(matrix_cluster, "_CONNECT", "500ms")
    options, observed = matrix.Options(tmp_path / "out", "tcp://127.0.0.1:1"), Observed(Events(lambda event: None))
    with pytest.raises(UsageError, match=r"no Dask scheduler answers \(tcp://127.0.0.1:1\)"):
        matrix.run_matrix(load_matrix(tmp_path / "m.yaml"), options, observed, lambda text: None)
