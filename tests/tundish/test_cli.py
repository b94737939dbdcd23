"""The command line as scripts meet it: exit statuses, JSON that stands alone on stdout, errors as one paragraph."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from onnx import TensorProto
from onnx.helper import make_graph, make_model

from converters.errors import ModelError, ResourceError
from exporters.base import Target
from exporters.onnx.data_file import external_tensor
from tests.tundish.keys import write_keys
from tests.tundish.tiny import INT4, write_recipe
from tundish import cli, doctor, tables
from tundish.console import show

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def tundish(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; what native libraries print is caught too."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["tundish", *map(str, arguments)])
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            cli.main()
            status: object = 0
        except SystemExit as ending:
            status = ending.code or 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        assert isinstance(status, int)
        return Ended(status, out, err)

    return run


@pytest.fixture
def gguf_recipe(checkpoint: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, context=128, schemes=INT4)


def require_refusal(ended: Ended, status: int, *said: str) -> None:
    """That status, nothing on stdout, and an error of one line behind whatever progress was told."""
    assert (ended.status, ended.out) == (status, ""), ended.err
    paragraph = ended.err.splitlines()[-1]
    assert paragraph.startswith("tundish: ")
    assert "Traceback" not in ended.err
    for words in said:
        assert words in paragraph


# ---- results ----


def test_recipes_rows(tundish: Run) -> None:
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    ended = tundish("recipes")
    header, *rows = ended.out.splitlines()
    assert ended.status == 0
    assert header.split() == ["recipe", "device", "containers", "scheme", "context", "what"]
    assert [row.split()[0] for row in rows] == names
    assert "phi35-mobile-int4 mobile gguf,onnx,mlx int4_g32" in {" ".join(row.split()[:4]) for row in rows}
    listed = json.loads(tundish("recipes", "--json").out)
    assert [row["name"] for row in listed] == names
    assert all(set(row["targets"]) <= set(Target) and row["targets"] for row in listed)


def test_a_recipe_resolved(tundish: Run) -> None:
    text, document = (
        tundish("recipes", "phi35-all-int4").out,
        json.loads(tundish("recipes", "phi35-all-int4", "--json").out),
    )
    assert "extends" not in text and "default: int4_g32" in text
    assert document["schemes"]["default"] == "int4_g32" and set(document["targets"]) == set(Target)


def test_plan_says_what_the_build_then_writes(tundish: Run, checkpoint: Path, poured: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, schemes=INT4)
    ended = tundish("plan", recipe, "--out", tmp_path / "out", "--json")
    assert ended.status == 0
    plan = json.loads(ended.out)
    for target, entry in plan["targets"].items():
        assert entry["files"] == {name: (poured / target / name).stat().st_size for name in entry["files"]}
        written = [path for path in (poured / target).rglob("*") if path.is_file() and path.name != "README.md"]
        assert entry["bytes"] == sum(path.stat().st_size for path in written)
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml"}, "a plan writes nothing"
    text = tundish("plan", recipe, "--out", tmp_path / "out").out
    for row in plan["tensors"]:
        assert row["name"] in text and f"{row['bytes']['gguf']:,}" in text
    assert f"disk: {plan['disk']:,} bytes" in text
    assert "time, about: " in text
    parts = ["prepare", "calibrate", "read", "quantize", "write", "source", "digest", "total"]
    assert list(plan["time"]) == parts
    assert plan["time"]["total"] > 0


def test_signed_builds(tundish: Run, gguf_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, out = write_keys(tmp_path, "key"), tmp_path / "out"
    public = key.with_suffix(".pub")
    require_refusal(
        tundish("build", gguf_recipe, "--sign-key", tmp_path / "none", "--out", out), 2, "cannot read the key"
    )
    built = tundish("build", gguf_recipe, "--sign-key", key, "--out", out, "--no-verify")
    assert built.status == 0 and f"written: {out} (signed)" in built.err
    signature = (out / "provenance.intoto.jsonl").read_bytes()
    checked = tundish("verify", out, "--key", public, "--files-only", "--json")
    assert checked.status == 0 and json.loads(checked.out) == json.loads((out / "manifest.json").read_text())
    build, files = checked.err.splitlines()
    assert build.startswith("build: recipe ") and "; signature: valid, by the key " in build
    assert files == "files: as they were built; the figures are the build's"
    assert "signature: not checked" in tundish("verify", out, "--files-only").err
    (out / "provenance.intoto.jsonl").unlink()
    require_refusal(tundish("verify", out, "--key", public, "--files-only"), 4, "the build is not signed")
    require_refusal(tundish("sign", out), 2, "no key to sign with")
    monkeypatch.setenv("TUNDISH_SIGNING_KEY", key.read_text())
    assert tundish("sign", out).status == 0 and (out / "provenance.intoto.jsonl").read_bytes() == signature
    card = out / "gguf" / "README.md"
    card.write_text(card.read_text().replace("Not verified", "Verified"))
    require_refusal(tundish("verify", out, "--key", public, "--files-only"), 4, "found gguf/README.md")
    require_refusal(tundish("sign", out), 4, "found gguf/README.md")
    require_refusal(tundish("push", out, "hf://a/b"), 4, "found gguf/README.md")
    rebuilt = tundish("build", gguf_recipe, "--out", out, "--no-verify")
    assert rebuilt.status == 0 and (out / "provenance.intoto.jsonl").read_bytes() == signature, "the same bytes again"


def test_an_importance_matrix(tundish: Run, checkpoint: Path, tmp_path: Path) -> None:
    calibration = {"source": "random-tokens", "tokens": 32}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, calibration=calibration)
    document = json.loads(tundish("imatrix", recipe, "--out", tmp_path / "i.dat", "--json").out)
    assert (document["format"], document["chunks"], document["chunk_size"]) == ("dat", 1, 32)
    assert document["bytes"] == (tmp_path / "i.dat").stat().st_size
    ended = tundish("imatrix", recipe, "--out", tmp_path / "i.dat", "--format", "gguf")
    assert ended.status == 0 and ended.out.startswith(f"{tmp_path / 'i.dat'}: {document['entries']} entries from 1 ")
    assert (tmp_path / "i.dat").read_bytes()[:4] == b"GGUF"
    require_refusal(tundish("imatrix", recipe, "--out", recipe), 2, "another file")
    recipe = write_recipe(tmp_path / "none.yaml", checkpoint, targets={"gguf": {}})
    require_refusal(tundish("imatrix", recipe, "--out", tmp_path / "j.gguf"), 2, "measures nothing", "none.yaml:1")


def test_plan_counts_what_the_build_will_do(tundish: Run, gguf_recipe: Path) -> None:
    plan = json.loads(tundish("plan", gguf_recipe, "--json").out)
    without = json.loads(tundish("plan", gguf_recipe, "--no-verify", "--threads", 4, "--json").out)
    assert set(plan["peak_memory"]) == {"pour", "reference", "comparison"} and set(without["peak_memory"]) == {"pour"}


def test_plan_names_a_group_that_does_not_divide_the_row(tundish: Run, checkpoint: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"onnx": {}}, schemes={"default": "int4_g64"})
    rows = {row["name"]: row for row in json.loads(tundish("plan", recipe, "--json").out)["tensors"]}
    down = rows["blocks.0.mlp_down"]  # rows of 96
    assert (down["requested"], down["scheme"]) == ("int4_g64", "int4_g32")
    text = tundish("plan", recipe).out
    assert f"int4_g32 (asked for int4_g64, whose groups or blocks do not divide {down['shape'][-1]})" in text


def test_inspect(tundish: Run, checkpoint: Path, poured: Path) -> None:
    rows = json.loads(tundish("inspect", checkpoint, "--json").out)
    assert {"file", "name", "type", "shape", "bytes", "shares"} == set(rows[0])
    assert {row["type"] for row in rows} == {"bfloat16"}
    assert {row["file"].split("/")[0] for row in json.loads(tundish("inspect", poured, "--json").out)} == set(Target)
    text = tundish("inspect", checkpoint).out
    assert text.splitlines()[-1] == f"{len(rows)} tensors, {sum(row['bytes'] for row in rows):,} bytes"


def test_inspect_counts_shared_bytes_once(tundish: Run, tmp_path: Path) -> None:
    graph = make_graph([], "shared", [], [])
    for name, shape, offset in (("codes", (4, 8), 64), ("rows", (32,), 64), ("scales", (4,), 0)):
        graph.initializer.append(external_tensor(name, TensorProto.UINT8, shape, offset, math.prod(shape)))
    (tmp_path / "model.onnx").write_bytes(make_model(graph).SerializeToString())
    rows = json.loads(tundish("inspect", tmp_path, "--json").out)
    assert [(row["name"], row["bytes"], row["shares"]) for row in rows] == [
        ("codes", 32, None),
        ("rows", 32, "codes"),
        ("scales", 4, None),
    ]
    lines = tundish("inspect", tmp_path).out.splitlines()
    assert lines[2].endswith("those of codes") and lines[-1] == "3 tensors, 36 bytes"


def test_doctor(tundish: Run) -> None:
    """The real thing: each runtime starts in a process of its own."""
    ended = tundish("doctor", "--json")
    rows = {row["target"]: row for row in json.loads(ended.out)}
    assert ended.status == 0 and set(rows) == set(Target)
    for row in rows.values():
        assert row["exports"] and (row["devices"] if row["verifies"] else row["mend"])


def test_doctor_as_a_table(tundish: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = doctor.Examination("mlx", True, False, {}, [], "pip install 'tundish[mlx]'")
    found = doctor.Examination("gguf", True, True, {"xllamacpp": "1.2"}, ["a CPU"], "")
    monkeypatch.setattr(doctor, "examine", lambda: [found, missing])
    header, first, second = tundish("doctor").out.splitlines()
    assert header.split() == ["container", "export", "verify", "versions", "devices"]
    assert first.split(maxsplit=3) == ["gguf", "yes", "yes", "xllamacpp 1.2  a CPU"]
    assert "no: pip install 'tundish[mlx]'" in second


def test_build_and_verify_as_json(tundish: Run, gguf_recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    recipe = json.loads(gguf_recipe.read_text())
    recipe["verify"]["gates"] = {"stops": False}
    gguf_recipe.write_text(json.dumps(recipe))
    built = tundish("build", gguf_recipe, "--out", tmp_path / "out", "--no-verify", "--threads", 1, "--json")
    assert built.status == 0, built.err
    assert json.loads(built.out) == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert built.err.splitlines()[-1] == f"written: {tmp_path / 'out'}", "progress goes to stderr"
    verified = tundish("verify", tmp_path / "out", "--json")
    assert verified.status == 0, verified.err
    manifest = json.loads(verified.out)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["verification"]["gguf"]["passed"] is True


def test_compare(tundish: Run, gguf_recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("matplotlib")
    assert tundish("build", gguf_recipe, "--out", tmp_path / "out", "--no-verify").status == 0
    text = tundish("compare", tmp_path / "out", "--length", 8)
    assert text.status == 0, text.err
    header, reference, row, empty, measured, speed = text.out.splitlines()
    assert header.split()[0] == "artifact" and reference.startswith("float32 reference") and empty == ""
    assert row.split()[0] == "out/gguf" and measured.endswith("1 sequences of 8 tokens.") and "tokens/s" in speed
    as_json = tundish("compare", tmp_path / "out", "--length", 8, "--out", tmp_path / "cmp", "--json")
    document = json.loads(as_json.out)
    assert document["artifacts"][0]["kl_mean"] > 0
    assert as_json.err.splitlines()[-1] == f"written: {tmp_path / 'cmp' / 'compare.md'}"
    require_refusal(tundish("compare", tmp_path, "--json"), 2, "not a folder that tundish built")


def test_summary_of_a_build(tundish: Run, gguf_recipe: Path, tmp_path: Path) -> None:
    header, row = tundish("build", gguf_recipe, "--out", tmp_path / "out", "--no-verify").out.splitlines()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert header.split() == ["target", "bytes", "gate", "result", "figure", "threshold", "detail"]
    assert row.split() == ["gguf", f"{manifest['targets']['gguf']['bytes']:,}", "–", "not", "verified"]
    manifest["verification"] = {
        "gguf": {
            "gates": [
                {"name": "kl", "passed": False, "figure": 0.5, "threshold": 0.25, "detail": "64 positions"},
                {"name": "stops", "passed": None, "figure": None, "threshold": None, "detail": "no prompt"},
            ]
        }
    }
    _, first, second = tables.summary_text(manifest).splitlines()
    assert first.split()[2:] == ["kl", "FAILED", "0.5", "0.25", "64", "positions"]
    assert second.split() == ["stops", "not", "verified", "no", "prompt"]


# ---- refusals ----


def test_status_2_bad_usage(tundish: Run, gguf_recipe: Path, poured: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    require_refusal(tundish("build", "no-such-recipe", "--json"), 2, "unknown recipe 'no-such-recipe'")
    require_refusal(tundish("recipes", "no-such-recipe", "--json"), 2, "expected one of")
    require_refusal(tundish("build", gguf_recipe, "--target", "mlx"), 2, "has no target mlx", "expected gguf")
    require_refusal(tundish("build", gguf_recipe, "--out", full, "--json"), 2, "files that tundish did not write")
    require_refusal(tundish("build", gguf_recipe, "--out", gguf_recipe), 2, "--out is not a folder")
    require_refusal(tundish("verify", full, "--json"), 2, "not a folder that tundish built")
    require_refusal(tundish("inspect", tmp_path / "absent", "--json"), 2, "nothing there")
    require_refusal(tundish("inspect", full), 2, "neither a checkpoint nor an artifact")
    require_refusal(tundish("sample", full, "--json"), 2, "a new or an empty folder only")
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("command", ["verify", "inspect", "compare", "sign", "push"])
def test_status_2_a_name_that_no_file_has(tundish: Run, tmp_path: Path, command: str) -> None:
    more = ["hf://owner/name"] if command == "push" else []
    require_refusal(tundish(command, tmp_path / ("x" * 300), *more), 2, "cannot look at the path", "too long")


@pytest.mark.skipif(sys.platform != "linux", reason="file systems whose names are UTF-8")
@pytest.mark.parametrize("inside", [True, False])
def test_status_2_a_name_that_is_not_utf8(
    tundish: Run, gguf_recipe: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    model = tmp_path / os.fsdecode(b"ti\xffny")
    shutil.copytree(checkpoint, model)
    monkeypatch.chdir(model)
    ended = tundish("build", gguf_recipe, "--model", "." if inside else model, "--out", tmp_path / "out")
    require_refusal(ended, 2, "the folder's name is not UTF-8", "Rename the folder.")


def test_a_strangers_words_in_an_error_are_one_plain_paragraph(
    tundish: Run, gguf_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("the chat template\nsays \x1b[2J", where="a\u202eb", found="tabs\t\tand\x00\r\n\nlines\udcff")

    monkeypatch.setattr("tundish.job.plan_job", refuse)
    ended = tundish("plan", gguf_recipe)
    assert ended.status == 3
    assert ended.err == "tundish: the chat template says \ufffd[2J (a\ufffdb); found tabs and\ufffd lines\ufffd.\n"


def test_status_2_a_recipe_with_a_mistake_names_its_line(tundish: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("description: x\ndevice: any\nmodel: {source: here}\nschemas: {}\n")
    require_refusal(tundish("plan", recipe, "--json"), 2, "unknown key 'schemas'", "r.yaml:4", "Did you mean schemes?")


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["plan"], ["build", "r", "--threads", "0"], ["build", "r", "--target", "tflite"]]
)
def test_status_2_a_line_that_cannot_be_parsed(tundish: Run, arguments: list[str]) -> None:
    ended = tundish(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert "Error: " in ended.err and "Traceback" not in ended.err


def test_status_3_bad_model(tundish: Run, gguf_recipe: Path, checkpoint: Path, tmp_path: Path) -> None:
    require_refusal(tundish("plan", gguf_recipe, "--model", tmp_path / "absent", "--json"), 3, "no such folder")
    require_refusal(tundish("plan", gguf_recipe, "--model", gguf_recipe), 3, "model is a file")
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint, cut)
    shard = min(cut.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    out = tmp_path / "out"
    ended = tundish("build", gguf_recipe, "--model", cut, "--out", out, "--json")
    require_refusal(ended, 3, f"cut off ({shard.name})", "expected", "found", "Download the file again.")
    require_refusal(tundish("inspect", cut, "--json"), 3, "cannot be read")
    assert not out.exists()


def test_status_4_a_gate_failed(tundish: Run, poured: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(poured, copy)
    (copy / "mlx" / "config.json").write_text("{}")
    require_refusal(tundish("verify", copy, "--json"), 4, "files differ from the manifest", "found mlx/config.json")


def test_status_5_no_disk(tundish: Run, gguf_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tundish("build", gguf_recipe, "--out", gguf_recipe / "deep", "--json")
    require_refusal(deep, 5, "cannot write", "r.yaml")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
    require_refusal(tundish("build", gguf_recipe, "--out", tmp_path / "out", "--json"), 5, "not enough disk")
    planned = tundish("plan", gguf_recipe, "--out", tmp_path / "out", "--json")
    assert planned.status == 5 and planned.err.startswith("tundish: not enough disk")
    document = json.loads(planned.out)
    assert f"expected {document['disk']:,} bytes free; found 1." in planned.err
    assert document["time"] is None, "what cannot be done takes no time"
    text = tundish("plan", gguf_recipe, "--out", tmp_path / "out")
    assert text.status == 5 and f"disk: {document['disk']:,} bytes" in text.out and "time," not in text.out


def test_status_5_a_place_that_cannot_be_reached(
    tundish: Run, gguf_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "x" * 300
    for out in (tmp_path / long / "x", tmp_path / long, tmp_path / long[:245]):
        ended = tundish("build", gguf_recipe, "--out", out)
        require_refusal(ended, 5, "File name too long", "Choose a shorter --out")
        assert "planning" not in ended.err, "before any work"
    closed, stat = tmp_path / "closed", os.stat

    def refusing(path: Any, *arguments: Any, **options: Any) -> os.stat_result:  # as a system does, but for root
        if not isinstance(path, int) and closed in Path(os.fsdecode(path)).parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    closed.mkdir()
    monkeypatch.setattr(os, "stat", refusing)
    for command in ("build", "plan"):
        refused = tundish(command, gguf_recipe, "--out", closed / "x" / "y")
        require_refusal(refused, 5, "cannot write: Permission denied", "Choose an --out that you may write to.")
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "closed"}


# ---- signals and pipes ----

# A shell's background job ignores SIGINT, and so would whatever pytest starts from one.
START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from tundish.cli import main; main()"


def wait_for_worker(build: subprocess.Popen[str]) -> psutil.Process:
    """The process of the runtime, once it runs our module."""
    while build.poll() is None:
        for child in psutil.Process(build.pid).children():
            if "tundish.worker" in child.cmdline():
                time.sleep(0.2)  # for the parent to return from starting it
                return child
        time.sleep(0.01)
    raise AssertionError("the build ended before a runtime was started")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_verifying_leaves_what_is_done(
    number: signal.Signals, tundish: Run, gguf_recipe: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-c", START, "build", str(gguf_recipe), "--out", str(tmp_path / "out"), "--threads", "1"]
    environment = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        said = list(itertools.takewhile(lambda line: line != "gguf: opening in its runtime\n", process.stderr))
        worker = wait_for_worker(process)
        worker.suspend()  # so that it is at work for as long as this takes
        process.send_signal(number)
        said += process.stderr.readlines()
        assert process.stdout.read() == ""
    assert process.returncode == 128 + number
    assert said[-1] == "tundish: interrupted; nothing was published.\n"
    assert not any("Traceback" in line for line in said)
    assert not worker.is_running(), "the runtime's process outlived the build"
    assert not list(scratch.iterdir())
    (left,) = tmp_path.glob(".out.*")
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "scratch", left.name}
    assert said[-2] == f"kept: {left}; the same command goes on from there, --fresh or another build removes it\n"
    assert tundish("build", str(gguf_recipe), "--out", str(tmp_path / "out"), "--no-verify").status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "scratch", "out"}


INTERRUPTED = """
import shutil, signal, sys
from pathlib import Path
from tundish import cli

rmtree = shutil.rmtree

def interrupted(folder, **options):
    if (Path(folder) / "manifest.json").exists():  # the build before; temporary folders are removed, too
        signal.raise_signal(signal.SIGTERM)
    rmtree(folder, **options)

shutil.rmtree = interrupted
cli.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_signal_after_publishing_says_so(tundish: Run, gguf_recipe: Path, tmp_path: Path) -> None:
    line = ["build", str(gguf_recipe), "--out", str(tmp_path / "out"), "--no-verify"]
    assert tundish(*line).status == 0
    before = (tmp_path / "out").stat().st_ino
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, *line], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (143, "")
    told = [f"written: {tmp_path / 'out'}", "tundish: interrupted; the build had been published by then."]
    assert ended.stderr.splitlines()[-2:] == told
    assert (tmp_path / "out").stat().st_ino != before and (tmp_path / "out" / "gguf" / "model.gguf").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "out"}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_job_started_by_nohup_stays_deaf_to_hangups(tundish: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    during = []

    def examine() -> list[doctor.Examination]:
        during.append(signal.getsignal(signal.SIGHUP))
        return []

    monkeypatch.setattr(doctor, "examine", examine)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert tundish("doctor").status == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert tundish("doctor").status == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert during[0] is signal.SIG_IGN
    assert during[1] not in (signal.SIG_IGN, signal.SIG_DFL)


class Full(io.StringIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_behind_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(ResourceError, match=r"standard output.*send it elsewhere") as raised:
        show({}, True, str)
    assert "--out" not in str(raised.value)
    with pytest.raises(ValueError, match="JSON compliant"):
        show({"figure": math.nan}, True, str)


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_left_is_no_crash() -> None:
    read, write = os.pipe()
    os.close(read)
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "tundish", "recipes", "--json"]
        done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=errors, check=False)
        os.close(write)
        errors.seek(0)
        assert errors.read() == ""
    assert done.returncode == 1


@pytest.mark.parametrize("odd", ["\n", "\r", "\x1b[31m", "\x7f", "\x85", "\u2028", "\udc80"])
def test_an_output_that_breaks_lines_is_refused_first(
    tundish: Run, gguf_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    out, absent = tmp_path / f"a{odd}b", tmp_path / "absent"
    (tmp_path / "matrix.yaml").write_text(json.dumps({"models": ["absent/a"], "recipes": [str(gguf_recipe)]}))
    commands = [
        ("build", gguf_recipe, "--out", out),
        ("plan", gguf_recipe, "--out", out),
        ("build", gguf_recipe, "--out", absent, "--events", out),
        ("build", gguf_recipe, "--out", absent, "--metrics", f"{out}.prom"),
        ("imatrix", gguf_recipe, "--out", out),
        ("compare", absent, "--out", out),
        ("matrix", tmp_path / "matrix.yaml", "--out", out),
        ("sample", out),
    ]
    for command in commands:
        require_refusal(tundish(*command), 2, f"U+{ord(odd[0]):04X}", "no path to write to")
    out.mkdir()
    monkeypatch.chdir(out)
    require_refusal(tundish("build", gguf_recipe), 2, f"U+{ord(odd[0]):04X}")
    assert not list(out.iterdir()) and not absent.exists()
