"""Builds from end to end, in the real runtimes, on a tiny model."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, LlamaFileType

from converters.checkpoint import open_checkpoint
from converters.errors import GateError, ModelError, ResourceError, UsageError
from converters.file_digest import sha256_of
from converters.quantize.imatrix import write_imatrix
from converters.quantize.importance import random_token_importance
from converters.source import Source
from exporters.base import Target
from exporters.gguf.importance import imatrix_names
from exporters.registry import EXPORTERS
from tests.tundish.keys import write_keys
from tests.tundish.tiny import INT4, QUIET, write_recipe
from tundish import job, verify
from tundish import publish as publishing
from tundish.cache import collect
from tundish.integrity import require_intact
from tundish.job import Choices, build
from tundish.model import open_model
from tundish.papers import sign_build
from tundish.recheck import recorded_source, verify_again
from tundish.recipe import load_recipe
from tundish.results import Gate, TargetResult
from tundish.watcher import Watcher

for module in ("xllamacpp", "onnxruntime_genai", "openvino_genai", "mlx_lm"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def fp32_build(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fp32")
    out = folder / "out with späces"
    return out, build(Choices(str(write_recipe(folder / "all.yaml", checkpoint)), out=out), QUIET)


def gates(manifest: Mapping[str, Any], target: str) -> dict[str, Any]:
    return {gate["name"]: gate for gate in manifest["verification"][target]["gates"]}


def test_every_gate_in_every_runtime(fp32_build: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = fp32_build
    for target in Target:
        results = gates(manifest, target)
        assert results["codes"]["passed"] and results["tokens"]["passed"] and results["runtime"]["passed"]
        for name in ("kl", "kl past the LongRoPE boundary", "state", "state past 256 tokens", "chat as opened"):
            assert results[name]["passed"], (target, name)
        assert results["chat as opened past 256 tokens"]["passed"], target
        assert "long factors apply at every position" in manifest["targets"][target]["semantics"]["sentence"]
        for state in ("state", "state past 256 tokens"):
            assert results[state]["passed"] and results[state]["figure"] < 1e-9, (target, results[state])
        assert results["chat as opened"]["passed"] and results["chat as opened past 256 tokens"]["passed"]
        assert results["as opened"]["figure"] is not None
    assert manifest["source"]["licence"] == "mit"
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert "| onnx | codes | passed |" in (out / "report.md").read_text()
    assert not list(out.parent.glob(".out*")), "no staging folder is left"


def test_artifact_folders_hold_what_the_manifest_says(fp32_build: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = fp32_build
    for target, entry in manifest["targets"].items():
        present = {path.relative_to(out / target).as_posix() for path in (out / target).rglob("*") if path.is_file()}
        assert present == {*entry["files"], *entry["documents"]} and {*entry["documents"]} == {"README.md"}
        nbytes = sum((out / target / name).stat().st_size for name in entry["files"])
        assert entry["bytes"] == nbytes, "the plan was exact"


def test_verify_again(checkpoint: Path, tmp_path: Path) -> None:
    """A build that was published unverified is verified later; manifest and report then say so."""
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path / "one.yaml", checkpoint, targets={"gguf": {}}, context=128)
    assert build(Choices(str(recipe), out=out, verify=False), QUIET)["verification"] is None
    manifest = verify_again(out, None, None, QUIET)
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["verification"]["gguf"]["passed"] and gates(manifest, "gguf")["kl"]["passed"]
    assert "| gguf | kl | passed |" in (out / "report.md").read_text()
    assert "| kl | passed |" in (out / "gguf" / "README.md").read_text()
    assert require_intact(out, 1).manifest == manifest
    key = write_keys(tmp_path, "key")
    sign_build(out, key, 1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    said: list[str] = []
    again = verify_again(out, None, None, replace(QUIET, say=said.append), key.with_suffix(".pub"))
    assert again["verification"] == manifest["verification"] and "; signature: valid, by the key " in said[0]
    assert "the folder is signed: its manifest and report stay as they are" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_moved(checkpoint: Path, tmp_path: Path) -> None:
    """The manifest does not say where it lay; --model finds it, and only its contents count."""
    first = tmp_path / "first"
    shutil.copytree(checkpoint, first)
    recipe = write_recipe(tmp_path / "one.yaml", first, targets={"gguf": {}}, context=128)
    manifest = build(Choices(str(recipe), out=tmp_path / "out", verify=False), QUIET)
    assert recorded_source(manifest["source"], None, 1)[0].folder == first
    collect(1, time.time(), QUIET.say)
    assert recorded_source(manifest["source"], None, 1)[0].folder == first
    first.rename(tmp_path / "second")
    with pytest.raises(UsageError, match=r"not where it was \(first\).*--model"):
        verify_again(tmp_path / "out", None, 1, QUIET)
    (tmp_path / "second").rename(first)
    collect(-math.inf, time.time(), QUIET.say)
    with pytest.raises(UsageError, match="not where it was"):
        recorded_source(manifest["source"], None, 1)
    first.rename(tmp_path / "second")
    source, _ = recorded_source(manifest["source"], str(tmp_path / "second"), 1)
    assert source.folder == tmp_path / "second"
    with pytest.raises(GateError, match="not signed"):
        verify_again(
            tmp_path / "out", str(tmp_path / "second"), 1, QUIET, write_keys(tmp_path, "k").with_suffix(".pub")
        )


def test_a_mix_of_block_types(checkpoint: Path, tmp_path: Path) -> None:
    """Calibrated, verified, told in the manifest and the file, and read again from the manifest's recipe."""
    changes = {
        "schemes": {"default": "q4_k_m", "overrides": {"mlp_down": "q8_0"}},
        "calibration": {"source": "random-tokens", "tokens": 32},
        "verify": {"text": {"sequences": 1, "length": 64}, "gates": {"kl": 0.4, "stops": False}},
        "context": 128,
    }
    recipe = write_recipe(tmp_path / "mix.yaml", checkpoint, targets={"gguf": {}}, **changes)
    out = tmp_path / "out"
    manifest = build(Choices(str(recipe), out=out), QUIET)
    assert gates(manifest, "gguf")["codes"]["passed"] and gates(manifest, "gguf")["kl"]["passed"]
    schemes = {name: entry["scheme"] for name, entry in manifest["weights"].items()}
    assert schemes["blocks.0.mlp_up"] == "q5_0" and schemes["blocks.0.mlp_down"] == "q8_0"
    assert GGUFReader(out / "gguf" / "model.gguf").fields["general.file_type"].contents() == LlamaFileType.MOSTLY_Q4_K_M
    assert verify_again(out, None, None, QUIET)["verification"] == manifest["verification"]
    everywhere = write_recipe(tmp_path / "all.yaml", checkpoint, **changes)
    with pytest.raises(UsageError, match=r"only GGUF holds.*target onnx, role embedding.*of the mix q4_k_m"):
        build(Choices(str(everywhere), out=tmp_path / "all"), QUIET)


def test_a_flipped_byte_is_named(checkpoint: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one.yaml", checkpoint, targets={"gguf": {}})
    build(Choices(str(recipe), out=tmp_path / "out", verify=False), QUIET)
    path = tmp_path / "out" / "gguf" / "model.gguf"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(GateError, match=r"files differ.*gguf/model\.gguf"):
        verify_again(tmp_path / "out", None, None, QUIET)


@pytest.mark.parametrize(
    "schemes", [INT4, {"default": "int4_g64"}, {"default": "int4_asym_g32"}, {"default": "int8_channel"}], ids=str
)
def test_the_same_numbers_in_every_container(checkpoint: Path, tmp_path: Path, schemes: dict[str, Any]) -> None:
    """Read back by gguf, onnx, openvino and mlx, each matrix is the same, bit for bit."""
    recipe_file = write_recipe(tmp_path / "all.yaml", checkpoint, schemes=schemes)
    build(Choices(str(recipe_file), out=tmp_path / "out", verify=False), QUIET)
    recipe = load_recipe(recipe_file)
    model = open_model(Source("tiny", checkpoint, None, None), recipe)
    matrices = {weight.name for weight in model.graph.weights.values() if len(weight.shape) == 2}
    read = {
        target: dict(exporter.read_back(tmp_path / "out" / target, model)) for target, exporter in EXPORTERS.items()
    }
    for target, values in read.items():
        assert values.keys() == matrices, target
        for name in matrices:
            np.testing.assert_array_equal(values[name], read[Target.GGUF][name], err_msg=f"{target} {name}")


def test_a_missed_gate_publishes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, context=128)
    build(Choices(str(recipe), out=out, verify=False), QUIET)
    before = (out / "gguf" / "model.gguf").read_bytes()
    write_recipe(recipe, checkpoint, targets={"gguf": {}}, context=128, schemes=INT4)
    with pytest.raises(GateError, match=r"gguf kl: 0\.\d+ against 1e-05.*out\.rejected"):
        build(Choices(str(recipe), out=out), QUIET)
    assert (out / "gguf" / "model.gguf").read_bytes() == before, "what was there stays"
    assert "FAILED" in (tmp_path / "out.rejected" / "report.md").read_text()


def test_a_crash_and_a_hang_are_failed_gates(checkpoint: Path, tmp_path: Path) -> None:
    """A runtime that dies takes neither the job nor the other runtimes with it."""
    targets = {"gguf": {}, "mlx": {"activations": "fp32"}}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets=targets, context=128)
    settled, out, scratch = load_recipe(recipe), tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    manifest = build(Choices(str(recipe), out=out, verify=False), QUIET)
    (out / "gguf" / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    digests = {name: entry["digest"] for name, entry in manifest["weights"].items() if "digest" in entry}
    source = Source("tiny", checkpoint, None, None)
    model = open_model(source, settled)
    gguf, mlx = verify.verify(model, source, settled, EXPORTERS, out, digests, scratch, 1, lambda text: None)
    assert gguf.passed is False and "last words" in gguf.gates[0].detail
    assert mlx.passed is True
    impatient = job.settle_recipe(Choices(str(recipe), targets=[Target.MLX]))
    impatient = impatient.model_copy(update={"verify": impatient.verify.model_copy(update={"time_limit": 1})})
    (hung,) = verify.verify(model, source, impatient, EXPORTERS, out, digests, scratch, 1, lambda text: None)
    assert "time limit of 1 s" in hung.gates[0].detail and hung.passed is False


KILLED = """
import os, sys
from pathlib import Path
from tundish import cli, verify

def reference(model, source, recipe, folder, threads):
    (folder / "reference.npy").write_bytes(bytes(10))

def killed(*arguments):
    (arguments[-2] / "logits.npy").write_bytes(bytes(10))
    os._exit(9)

verify.make_reference, verify._verify_target = reference, killed
cli.main()
"""


def test_logits_of_a_build_that_was_killed_go_with_it(checkpoint: Path, tmp_path: Path) -> None:
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, context=128)
    environment = os.environ | {"TMPDIR": str(temporary)}
    command = [sys.executable, "-c", KILLED, "build", str(recipe), "--out", str(out)]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, env=environment, capture_output=True).returncode == 9
    assert len(list(tmp_path.glob(".out.*.partial/**/*.npy"))) == 2 and not list(temporary.iterdir())
    told: list[str] = []
    build(Choices(str(recipe), out=out, verify=False), replace(QUIET, say=told.append))
    assert [line.split(": ")[0] for line in told].count("taken over from a build that was killed") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tmp", "r.yaml"}
    assert not list(out.rglob("*.npy"))


def test_logits_go_with_their_target(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[set[str]] = []

    def fake(*arguments: Any) -> TargetResult:
        folder = arguments[-2]
        (folder / f"{arguments[3].target}.npy").write_bytes(bytes(10))
        found.append({path.name for path in folder.parent.rglob("*.npy")})
        return TargetResult(arguments[3].target, (Gate("runtime", True),))

    monkeypatch.setattr(verify, "make_reference", lambda *arguments: None)
    monkeypatch.setattr(verify, "_verify_target", fake)
    targets = {"gguf": {}, "mlx": {"activations": "fp32"}}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets=targets, context=128)
    build(Choices(str(recipe), out=tmp_path / "out"), QUIET)
    assert found == [{"gguf.npy"}, {"mlx.npy"}]


def test_a_disk_that_is_full_while_verifying(
    checkpoint: Path, poured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build's logits are of its plan, and lie where --out says; those of `tundish verify` are and do neither."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(verify, "make_reference", full)
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, context=128)
    with pytest.raises(ResourceError, match=r"out.*expected [\d,]+ bytes for the whole build.*another --out"):
        build(Choices(str(recipe), out=tmp_path / "out"), QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    with pytest.raises(ResourceError, match=r"temporary files.*TMPDIR") as raised:
        verify_again(poured, str(checkpoint), 1, QUIET)
    assert "--out" not in str(raised.value) and "whole build" not in str(raised.value)


def test_a_disk_that_is_full_while_signing(poured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tundish.papers.replace_file", full)
    with pytest.raises(ResourceError, match="Free space there") as raised:
        sign_build(poured, write_keys(tmp_path, "key"), 1)
    assert "--out" not in str(raised.value)


def test_an_importance_matrix_file(checkpoint: Path, tmp_path: Path) -> None:
    """Means of what the model itself does on random tokens, in a file, make the artifact that these tokens make."""
    calibration: dict[str, object] = {"source": "random-tokens", "tokens": 32}
    changes: dict[str, Any] = {"targets": {"gguf": {}}, "context": 128, "schemes": INT4}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, calibration=calibration, **changes)
    expected = build(Choices(str(recipe), out=tmp_path / "tokens", verify=False), QUIET)
    graph = open_model(Source("tiny", checkpoint), load_recipe(recipe)).graph
    # Without the floor that importances have, which reading the file adds; of fused parts one entry serves all.
    means = {
        imatrix_names(graph)[name][0]: values - np.float32(0.01)
        for name, values in random_token_importance(graph, 32, 0).items()
    }
    for name, legacy in (("i.gguf", False), ("i.dat", True)):
        write_imatrix(tmp_path / name, means, chunks=1, chunk_size=32, legacy=legacy)
        calibration = {"source": "imatrix", "file": str(tmp_path / name)}
        write_recipe(recipe, checkpoint, calibration=calibration, **changes)
        manifest = build(Choices(str(recipe), out=tmp_path / f"{name}-out", verify=False), QUIET)
        equal = [row["digest"] == expected["weights"][key].get("digest") for key, row in digests_of(manifest).items()]
        assert np.mean(equal) > 0.9, "but for codes that a rounding error of the means decides"
        digest = sha256_of([tmp_path / name])[tmp_path / name]
        assert manifest["calibration"] == {"source": "imatrix", "file": name, "sha256": digest}
    head = imatrix_names(graph)["lm_head"][0]
    write_imatrix(tmp_path / "i.gguf", {name: means[name] for name in means if name != head}, chunks=1, chunk_size=32)
    calibration = {"source": "imatrix", "file": str(tmp_path / "i.gguf")}
    write_recipe(recipe, checkpoint, calibration=calibration, **changes)
    said: list[str] = []
    watcher = Watcher(said.append, QUIET.start, QUIET.advance)
    build(Choices(str(recipe), out=tmp_path / "headless", verify=False), watcher)
    assert "calibration: no entry for lm_head, whose columns count the same" in said
    plain = write_recipe(tmp_path / "r.yaml", checkpoint, **changes)
    unweighted = digests_of(build(Choices(str(plain), out=tmp_path / "out", verify=False), QUIET))
    changed = [name for name, row in unweighted.items() if row["digest"] != expected["weights"][name]["digest"]]
    assert set(changed) == unweighted.keys() - {"embedding"}, "so that equal digests mean something"
    write_imatrix(tmp_path / "i.gguf", {"blk.9.ffn_up.weight": means["blk.0.ffn_up.weight"]}, chunks=1, chunk_size=32)
    calibration = {"source": "imatrix", "file": str(tmp_path / "i.gguf")}
    write_recipe(recipe, checkpoint, calibration=calibration, **changes)
    with pytest.raises(UsageError, match=r"of another model.*blk\.9\.ffn_up\.weight, which this model has not"):
        build(Choices(str(recipe), out=tmp_path / "out2", verify=False), QUIET)
    assert not (tmp_path / "out2").exists()


def digests_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in manifest["weights"].items() if "digest" in row}


def test_a_missing_runtime(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_llama(name: str, package: str | None = None) -> object:
        return None if name == "xllamacpp" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_llama)
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, context=128)
    manifest = build(Choices(str(recipe), out=tmp_path / "out"), QUIET)
    gate = manifest["verification"]["gguf"]["gates"][0]
    assert gate["passed"] is None and "xllamacpp not installed" in gate["detail"]
    assert "not verified" in (tmp_path / "out" / "report.md").read_text()
    required = json.loads(recipe.read_text())["verify"] | {"required": ["gguf"]}
    write_recipe(recipe, checkpoint, targets={"gguf": {}}, context=128, verify=required)
    with pytest.raises(GateError, match="the recipe requires this runtime"):
        build(Choices(str(recipe), out=tmp_path / "out2"), QUIET)


def test_disk_is_asked_for_before_work_starts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}})
    with pytest.raises(ResourceError, match=r"not enough disk.*expected [\d,]+ bytes free; found 1"):
        build(Choices(str(recipe), out=tmp_path / "deep" / "out"), QUIET)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("change", ["rewritten", "overwritten", "cut off", "removed"])
def test_a_checkpoint_that_changes_while_it_is_read(checkpoint: Path, tmp_path: Path, change: str) -> None:
    moving, out = tmp_path / "moving", tmp_path / "out"
    shutil.copytree(checkpoint, moving)
    weights = max(moving.glob("*.safetensors"))  # the last shard
    times = weights.stat()

    def spoil(elements: int) -> None:
        if change == "rewritten":
            weights.write_bytes(weights.read_bytes())
        elif change == "overwritten":  # in place, and its time set back
            with weights.open("r+b") as file:
                file.write(weights.read_bytes())
            os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        elif change == "cut off":
            os.truncate(weights, times.st_size - 1)
        else:
            weights.unlink(missing_ok=True)

    recipe = write_recipe(tmp_path / "r.yaml", moving, targets={"gguf": {}}, context=128)
    watcher = Watcher(QUIET.say, QUIET.start, spoil)
    with pytest.raises(ModelError, match="the checkpoint changed while it was read"):
        build(Choices(str(recipe), out=out, verify=False), watcher)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("change", ["zeroed", "a shard removed", "the tokenizer removed"])
def test_a_checkpoint_that_changes_while_it_is_verified(checkpoint: Path, tmp_path: Path, change: str) -> None:
    moving, out = tmp_path / "moving", tmp_path / "out"
    shutil.copytree(checkpoint, moving)
    recipe = write_recipe(tmp_path / "r.yaml", moving, targets={"gguf": {}}, context=128)
    build(Choices(str(recipe), out=out, verify=False), QUIET)
    before = (out / "manifest.json").read_bytes()
    weights, whole = max(moving.glob("*.safetensors")), tmp_path / "whole"
    shutil.copytree(moving, whole)

    def spoil(text: str) -> None:
        if not text.startswith("reference:"):
            return
        if change == "zeroed":
            weights.write_bytes(weights.read_bytes()[:-1000] + bytes(1000))
        else:
            (weights if change == "a shard removed" else moving / "tokenizer.json").unlink()

    watcher = Watcher(spoil, QUIET.start, QUIET.advance)
    with pytest.raises(ModelError, match="the checkpoint changed while it was read"):
        verify_again(out, None, None, watcher)
    shutil.copytree(whole, moving, dirs_exist_ok=True)
    with pytest.raises(ModelError, match="the checkpoint changed while it was read"):
        build(Choices(str(recipe), out=out), watcher)
    assert (out / "manifest.json").read_bytes() == before, "what was there stays"
    assert not (tmp_path / "out.rejected").exists() and not list(tmp_path.glob(".out*"))


def test_files_that_may_not_be_read(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the work starts, with the file's name."""
    closed = checkpoint / "tokenizer_config.json"
    out, open_path = tmp_path / "out", Path.open
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, context=128)
    build(Choices(str(recipe), out=out, verify=False), QUIET)

    def open_unless_closed(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_path(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_unless_closed)  # root may read everything
    with pytest.raises(ModelError, match=r"file cannot be read .*tokenizer_config\.json.*Permission denied"):
        build(Choices(str(recipe), out=tmp_path / "new", verify=False), Watcher(QUIET.say, _no_start, QUIET.advance))
    closed = out / "gguf" / "model.gguf"
    with pytest.raises(ModelError, match=r"file cannot be read .*model\.gguf.*Permission denied"):
        verify_again(out, None, None, QUIET)


def _no_start(text: str, total: int) -> None:
    pytest.fail("the pour began")


@pytest.mark.parametrize("scheme", ["q4_k_m", "int4_g32"])
def test_a_pruned_layer_is_calibrated_and_verified(checkpoint: Path, tmp_path: Path, scheme: str) -> None:
    pruned = tmp_path / "pruned"
    shutil.copytree(checkpoint, pruned)
    tensor = open_checkpoint(pruned)["model.layers.0.mlp.gate_up_proj.weight"]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(bytes(tensor.nbytes))
    recipe = write_recipe(
        tmp_path / "r.yaml",
        pruned,
        targets={"gguf": {}},
        schemes={"default": scheme},
        calibration={"source": "random-tokens", "tokens": 32},
        verify={"text": {"sequences": 1, "length": 64}, "gates": {"kl": 2.0, "stops": False}},
        context=128,
    )
    manifest = build(Choices(str(recipe), out=tmp_path / "out"), QUIET)
    assert gates(manifest, "gguf")["codes"]["passed"] and gates(manifest, "gguf")["kl"]["passed"]


def test_an_unfinished_folder_that_is_taken_away(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"mlx": {}}, context=128)
    before = build(Choices(str(recipe), out=out, verify=False), QUIET)

    def take_away(elements: int) -> None:
        for folder in tmp_path.glob(".out.*"):
            shutil.rmtree(folder)

    with pytest.raises(ResourceError, match="cannot write"):
        build(Choices(str(recipe), out=out, verify=False), Watcher(QUIET.say, QUIET.start, take_away))
    assert json.loads((out / "manifest.json").read_text()) == before


def test_wrong_targets_and_models(checkpoint: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}))
    with pytest.raises(UsageError, match="has no target mlx"):
        build(Choices(recipe, targets=[Target.MLX]), QUIET)
    with pytest.raises(UsageError, match="no model given"):
        build(Choices(recipe, model=" "), QUIET)
    with pytest.raises(ModelError):
        build(Choices(recipe, model=str(tmp_path / "absent"), out=tmp_path / "out"), QUIET)
    assert not (tmp_path / "out").exists()


def test_a_child_killed_while_it_wrote_a_line(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"step": "codes", "digests": {}}\n{"step": "tokens", "ids": [[1, ')
    assert verify._read_events(tmp_path / "events.jsonl") == {"codes": {"step": "codes", "digests": {}}}


def test_what_appears_under_the_name_during_a_build_stays(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"mlx": {}}, context=128)

    def appear(elements: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("precious")

    told: list[str] = []
    watcher = Watcher(told.append, QUIET.start, appear, lambda out: told.append("published"))
    with pytest.raises(UsageError, match=r"changed during the build.*out\.new"):
        build(Choices(str(recipe), out=out, verify=False), watcher)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    assert "published" not in told and not list(tmp_path.glob(".out*"))
    assert verify_again(tmp_path / "out.new", None, None, QUIET)["verification"]["mlx"]["passed"], "all of it is there"


def test_a_build_reclaims_what_a_killed_one_left(checkpoint: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, targets={"gguf": {}}, context=128)
    left = tmp_path / f".out.abcd_123.{publishing._machine_of(tmp_path)}.partial"
    (left / "gguf").mkdir(parents=True)
    told: list[str] = []
    watcher = Watcher(told.append, QUIET.start, QUIET.advance, lambda out: told.append("published"))
    build(Choices(str(recipe), out=tmp_path / "out", verify=False), watcher)
    assert not left.exists() and told[0].startswith(f"removed: {left}")
    assert told[-2:] == ["published", f"written: {tmp_path / 'out'}"]


@pytest.mark.parametrize("file", ["..yaml", "...yaml"])
def test_a_recipe_whose_name_names_no_folder(tmp_path: Path, file: str) -> None:
    path = write_recipe(tmp_path / file, tmp_path)
    with pytest.raises(UsageError, match=r"names no folder.*or choose --out"):
        build(Choices(str(path)), QUIET)


@pytest.mark.parametrize("model", ["~nobody-of-this-name/x", "a\0b"])
def test_a_model_that_is_no_path(tmp_path: Path, model: str) -> None:
    path = write_recipe(tmp_path / "r.yaml", tmp_path)
    with pytest.raises(UsageError, match="no such model"):
        build(Choices(str(path), model=model, out=tmp_path / "out"), QUIET)
