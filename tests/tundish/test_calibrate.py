"""Calibration on text: what GPTQ chooses is what every container holds, and what cannot be is refused."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.dataset import Dataset
from converters.errors import ModelError, UsageError
from converters.graph import Graph
from converters.interpret import WeightRows, interpret
from converters.passes.fold import ScaledSource
from converters.quantize.codes import CodeStore
from converters.quantize.sequential import Moments
from converters.quantize.tensor import QuantTensor
from converters.source import Source
from exporters.base import Target
from exporters.registry import EXPORTERS
from tests.tundish.tiny import INT4, QUIET, write_recipe
from tundish import calibrate as calibrating
from tundish.calibrate import Calibrated, calibrate, calibration_text, origin_of, title_of
from tundish.calibration_progress import Workplace
from tundish.calibration_text import Documentation, Files, calibration_sequences
from tundish.digest import digest_of
from tundish.documentation import NAME
from tundish.job import Choices, build, plan_job
from tundish.model import open_model
from tundish.pour import Poured, pour
from tundish.recipe import Calibration, CalibrationSource, load_recipe

SCHEMES = {"default": "int4_asym_g32", "overrides": {"lm_head": "int8_g32"}}
SIZE = {"sequences": 4, "length": 64}
LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"  # read at once, which the built-in text is not
TEXT = {"source": "text", "text": str(LICENSE), **SIZE}


def calibrated(checkpoint: Path, folder: Path) -> Calibrated:
    folder.mkdir(exist_ok=True)
    recipe = load_recipe(write_recipe(folder / "r.yaml", checkpoint, schemes=SCHEMES, method="gptq", calibration=TEXT))
    model = open_model(Source("tiny", checkpoint), recipe)
    told: list[tuple[str, int]] = []
    done: list[int] = []
    text = calibration_text(model, recipe)
    say, start, advance = lambda said: None, lambda *what: told.append(what), done.append
    found = calibrate(model, recipe, text, lambda find: find(Workplace(folder)), say, start, advance)
    assert told == [("fitting layers", sum(done))]
    return found


def test_the_built_in_text_is_what_a_recipe_reads_that_names_none() -> None:
    """tests/tundish/test_calibration_text.py reads it."""
    origin = origin_of(Calibration(source=CalibrationSource.TEXT))
    assert origin == Documentation() and title_of(origin) == NAME


def test_rows_may_be_fitted_apart(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrated(checkpoint, tmp_path / "whole")
    monkeypatch.setattr(calibrating, "FIT_ELEMENTS", 64 * 50)
    parts = calibrated(checkpoint, tmp_path / "parts")
    model = open_model(Source("tiny", checkpoint), load_recipe(tmp_path / "whole" / "r.yaml"))
    for name in ("blocks.0.attn_q", "lm_head"):
        one, other = (each.quantize(model.graph.weights[name], 3, 61) for each in (whole, parts))
        assert isinstance(one, QuantTensor) and isinstance(other, QuantTensor)
        assert one.shape == other.shape == (58, 64) and (one.zero is None) == (other.zero is None)
        assert (one.codes == other.codes).mean() > 0.98, "but for the rounding of sums"


def test_what_was_not_fitted_is_rounded(checkpoint: Path, tmp_path: Path) -> None:
    found = calibrated(checkpoint, tmp_path)
    model = open_model(Source("tiny", checkpoint), load_recipe(tmp_path / "r.yaml"))
    embedding = found.quantize(model.graph.weights["embedding"], 0, 2)
    assert found.codes is not None and "embedding" not in found.codes and isinstance(embedding, QuantTensor)
    assert not list(tmp_path.glob("embedding*"))


def test_moments_that_are_no_good_name_the_matrix(checkpoint: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", checkpoint, schemes=SCHEMES))
    weight = open_model(Source("tiny", checkpoint), recipe).graph.weights["blocks.0.attn_q"]
    singular = -np.eye(64, dtype=np.float32)
    with pytest.raises(ModelError, match=r"cannot be fitted.*blocks\.0\.attn_q.*singular"):
        calibrating._fit(CodeStore(tmp_path), None, weight, Moments(singular))


GPTQ: dict[str, object] = {
    "method": "gptq",
    "calibration": TEXT | {"seed": 3},
}


@pytest.mark.parametrize("default", ["int4_g32", "int4_asym_g64"])
def test_gptq_gives_every_container_the_same_numbers(checkpoint: Path, tmp_path: Path, default: str) -> None:
    """Read back from each they are what the quantizer chose, and nearer to the model than rounded ones."""
    schemes = {"default": default, "overrides": {"embedding": "int8_g32", "lm_head": "int8_g32"}}
    recipe_file = write_recipe(tmp_path / "all.yaml", checkpoint, schemes=schemes, **GPTQ)
    manifest = build(Choices(str(recipe_file), out=tmp_path / "out", verify=False), QUIET)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [], "codes are removed"
    recipe = load_recipe(recipe_file)
    model = open_model(Source("tiny", checkpoint, None, None), recipe)
    read = {
        target: dict(exporter.read_back(tmp_path / "out" / target, model)) for target, exporter in EXPORTERS.items()
    }
    for name, values in read[Target.GGUF].items():
        for target in Target:
            np.testing.assert_array_equal(values, read[target][name], err_msg=f"{target} {name}")
        assert digest_of(values) == manifest["weights"][name]["digest"]
    token_ids = calibration_sequences(model, Files(LICENSE), 4, 64, seed=3)
    digest = hashlib.sha256(token_ids.astype("<i8").tobytes()).hexdigest()
    assert manifest["calibration"] == {
        "source": "text",
        "method": "gptq",
        "text": "LICENSE",
        "token_ids_sha256": digest,
        "sequences": 4,
        "length": 64,
        "seed": 3,
        "chat": False,
    }
    rounded = write_recipe(tmp_path / "rtn.yaml", checkpoint, schemes=schemes, **(GPTQ | {"method": "rtn"}))
    build(Choices(str(rounded), out=tmp_path / "rtn", targets=[Target.GGUF], verify=False), QUIET)
    plain = dict(EXPORTERS[Target.GGUF].read_back(tmp_path / "rtn" / "gguf", model))
    logits = interpret(model.graph, token_ids)

    def off(values: Mapping[str, np.ndarray]) -> float:
        return float(
            np.square(interpret(model.graph, token_ids, lambda w: values.get(w.name, WeightRows(w))) - logits).mean()
        )

    assert off(read[Target.GGUF]) < 0.8 * off(plain)
    np.testing.assert_array_equal(plain["embedding"], read[Target.GGUF]["embedding"])


@pytest.mark.parametrize("method", ["hqq", "awq", "awq+gptq", "gptq+adaround"])
def test_other_methods_compute_the_same_model(
    checkpoint: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its runtime the artifact answers like the float model, scaled columns and what undoes them together."""
    verify = {"text": {"sequences": 4, "length": 64}, "gates": {"kl": 0.4, "stops": False}}
    schemes = {"default": "int4_g32", "overrides": {"embedding": "int8_g32", "lm_head": "int8_g32"}}
    keys = GPTQ | {"method": method, "targets": {"gguf": {}}, "verify": verify}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, schemes=schemes, **keys)
    poured: list[Graph] = []

    def watch(graph: Graph, *rest: Any) -> Poured:
        poured.append(graph)
        return pour(graph, *rest)

    monkeypatch.setattr("tundish.job.pour", watch)
    manifest = build(Choices(str(recipe), out=tmp_path / "out"), QUIET)
    assert manifest["calibration"]["method"] == method
    scaled = {name for name, weight in poured[0].weights.items() if isinstance(weight.source, ScaledSource)}
    assert ({"blocks.0.mlp_norm", "blocks.0.mlp_gate", "blocks.1.mlp_up"} <= scaled) == method.startswith("awq")
    weights = manifest["weights"]
    rounded = write_recipe(tmp_path / "rtn.yaml", checkpoint, schemes=schemes, **keys | {"method": "rtn"})
    plain = build(Choices(str(rounded), out=tmp_path / "rtn", verify=False), QUIET)["weights"]
    differing = {name for name in weights if weights[name].get("digest") != plain[name].get("digest")}
    assert {"blocks.0.attn_q", "blocks.1.mlp_down"} <= differing


def test_a_dataset_is_read_at_its_commit(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recipe asks of the Hub; tests/converters/test_hub_dataset.py asks a server."""
    asked: list[object] = []

    def find(*what: object) -> Dataset:
        asked.append(what)
        return Dataset("acme/prose", "c0ffee" * 6, ("train.txt",))

    (tmp_path / "train.txt").write_bytes(LICENSE.read_bytes())
    monkeypatch.setattr("converters.hub_dataset.find_dataset", find)
    monkeypatch.setattr("converters.hub_dataset.fetch", lambda dataset, name: tmp_path / name)
    calibration = {"source": "dataset", "dataset": "acme/prose", "revision": "v1", "files": "train*", **SIZE}
    changes: dict[str, Any] = {"targets": {"gguf": {}}, "context": 128, "schemes": INT4, "calibration": calibration}
    record = build(
        Choices(str(write_recipe(tmp_path / "r.yaml", checkpoint, **changes)), out=tmp_path / "out", verify=False),
        QUIET,
    )
    assert asked == [("acme/prose", "v1", "train*")]
    assert (record["calibration"]["text"], record["calibration"]["revision"]) == (
        "acme/prose at c0ffeec0ffee",
        "c0ffee" * 6,
    )


def test_text_weighs_the_errors_of_block_types_and_gptq_leaves_these_to_it(checkpoint: Path, tmp_path: Path) -> None:
    schemes = {"default": "int4_g32", "overrides": {"attn_output": "q4_0", "embedding": "fp16"}}
    changes: dict[str, Any] = {"targets": {"gguf": {}}, "context": 128, "schemes": schemes}
    manifests = {}
    for name, more in {"none": {}, "rtn": GPTQ | {"method": "rtn"}, "gptq": GPTQ}.items():
        recipe = write_recipe(tmp_path / f"{name}.yaml", checkpoint, **changes, **more)
        weights = build(Choices(str(recipe), out=tmp_path / name, verify=False), QUIET)["weights"]
        manifests[name] = {key: row for key, row in weights.items() if "digest" in row}
    for name in manifests["none"]:
        none, rtn, gptq = (manifests[each][name]["digest"] for each in ("none", "rtn", "gptq"))
        assert (none != rtn) == (name != "embedding"), name
        if manifests["none"][name]["scheme"] == "int4_g32":
            assert gptq not in (none, rtn), name
    assert manifests["gptq"]["blocks.0.attn_output"]["digest"] != manifests["none"]["blocks.0.attn_output"]["digest"]


@pytest.mark.parametrize(
    ("schemes", "found"),
    [
        ({"default": "fp16"}, "fp16, fp32"),
        ({"default": "fp16", "overrides": {"embedding": "int8_g32"}}, "fp16, fp32, int8_g32"),
        ({"default": "q4_k_m"}, "fp32, q5_0, q8_0"),
    ],
)
def test_gptq_without_a_matrix_to_fit_is_refused(
    checkpoint: Path, tmp_path: Path, schemes: dict[str, Any], found: str
) -> None:
    changes: dict[str, Any] = {"targets": {"gguf": {}}, "context": 128, "schemes": schemes}
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, **changes, **GPTQ)
    for refused in (build, lambda choices, watcher: plan_job(choices)):
        with pytest.raises(UsageError, match=rf"method gptq has no matrix to work on.*found schemes {found}\."):
            refused(Choices(str(recipe), out=tmp_path / "out"), QUIET)
    assert not (tmp_path / "out").exists()


def test_calibration_that_cannot_be_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"targets": {"gguf": {}}, "context": 128, "schemes": INT4}
    recipe = write_recipe(
        tmp_path / "r.yaml", checkpoint, **changes, calibration={"source": "text", "sequences": 1, "length": 129}
    )
    with pytest.raises(UsageError, match=r"more than the context.*at most 128 tokens; found 129"):
        plan_job(Choices(str(recipe), out=tmp_path / "out"))
    (tmp_path / "t.txt").write_text("too little")
    calibration = {"source": "text", "text": str(tmp_path / "t.txt"), "sequences": 1, "length": 128}
    write_recipe(recipe, checkpoint, **changes, calibration=calibration)
    with pytest.raises(UsageError, match=r"too short.*t\.txt"):
        build(Choices(str(recipe), out=tmp_path / "out"), QUIET)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))] == []


def test_a_layer_that_cannot_be_fitted_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """Also a norm, whose NaN calibration meets as what the model computes."""
    changes: dict[str, Any] = {"targets": {"gguf": {}}, "context": 128, "schemes": INT4, **GPTQ}
    for name, message in (
        ("blocks.1.mlp_norm", r"weights contain NaN or Inf \(blocks\.1\.mlp_norm in .*element \[63\]"),
        ("blocks.0.mlp_up", r"weights contain NaN or Inf \(blocks\.0\.mlp_up"),
        ("lm_head", r"weights contain NaN or Inf \(lm_head"),
    ):
        damaged = tmp_path / name
        shutil.copytree(checkpoint, damaged)
        recipe = write_recipe(tmp_path / "r.yaml", damaged, **changes)
        weight = open_model(Source("tiny", damaged), load_recipe(recipe)).graph.weights[name]
        path, offset = weight.source.location
        with Path(path).open("r+b") as file:
            file.seek(offset + 2 * math.prod(weight.shape[1:]) * (weight.shape[0] - 1))  # no row that a plan looks at
            file.write(np.float32(np.nan).tobytes()[2:])
        with np.errstate(all="ignore"), pytest.raises(ModelError, match=message):
            build(Choices(str(recipe), out=tmp_path / "out", verify=False), QUIET)
    assert not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()
