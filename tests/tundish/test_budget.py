"""Budgets: what a tiny model gets within one, in all containers at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.errors import UsageError
from converters.quantize.block import dequantize, quantize_rows
from converters.quantize.scheme import SCHEMES
from converters.quantize.sensitivity import stacks
from converters.source import Source
from exporters.base import Target
from exporters.registry import EXPORTERS
from tests.converters.arrays import ArraySource
from tests.tundish.tiny import QUIET, write_recipe
from tundish.budget import _measured_costs, _Options
from tundish.budget_size import parse_budget
from tundish.job import Choices, build, plan_job
from tundish.model import open_model
from tundish.plan import Plan, make_plan
from tundish.recheck import verify_again
from tundish.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
CALIBRATION = {"source": "random-tokens", "tokens": 16}
FOUR = ["gguf", "onnx", "openvino", "mlx"]


def recipe(folder: Path, source: Path, budget: object, targets: list[str] = FOUR, **changes: object) -> Path:
    keys: dict[str, object] = {
        "schemes": {"default": "int4_g32"},
        "calibration": CALIBRATION,
        "targets": {target: {} for target in targets},
        "verify": {"text": {"sequences": 1, "length": 64}, "time_limit": 240, "gates": {"kl": 0.5, "stops": False}},
    }
    if budget is not None:
        keys["budget"] = budget
    return write_recipe(folder / "budget.yaml", source, **keys | changes)


def uniform(folder: Path, source: Path, scheme: str, targets: list[str] = FOUR) -> int:
    """Bytes of the largest artifact if all matrices have one scheme."""
    made = load_recipe(recipe(folder, source, None, targets, schemes={"default": scheme}))
    plan = make_plan(open_model(Source("tiny", source), made), made, EXPORTERS, verified=False)
    return max(layout.nbytes for layout in plan.layouts.values())


def planned(path: Path) -> Plan:
    return plan_job(Choices(str(path), verify=False))[1]


@pytest.mark.parametrize(
    ("text", "nbytes", "bits", "share"),
    [
        ("92MB", 92_000_000, None, None),
        ("1.9 GB", 1_900_000_000, None, None),
        ("88MiB", 88 << 20, None, None),
        ("1.5GiB", 3 << 29, None, None),
        ("4.5bpw", None, 4.5, None),
        ("120%", None, None, 1.2),
    ],
)
def test_sizes(text: str, nbytes: int | None, bits: float | None, share: float | None) -> None:
    size = parse_budget(text)
    assert (size.nbytes, size.bits_per_weight, size.share) == (nbytes, bits, share)


@pytest.mark.parametrize(
    "text", ["92", "92mb", "-1MB", "0MB", "1e3MB", "MB", "92MB or so", "4.5 bits", "92MB\n", "٣MB"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="such as 4"):
        parse_budget(text)


def test_every_artifact_fits_and_stacks_have_one_scheme(checkpoint: Path, tmp_path: Path) -> None:
    low, high = (uniform(tmp_path, checkpoint, scheme) for scheme in ("int4_g32", "int8_g32"))
    budget = (low + high) // 2
    path = recipe(tmp_path, checkpoint, {"size": f"{budget / 1e6:.6f}MB", "schemes": ["int4_g32", "int8_g32"]})
    plan = planned(path)
    assert plan.assignment is not None
    sizes = {target: layout.nbytes for target, layout in plan.layouts.items()}
    assert max(sizes.values()) <= budget < max(sizes.values()) + (high - low) // 3, "and little room is left"
    assert plan.assignment.chosen.nbytes == sizes, "headers are foreseen exactly"
    by_name = {row.name: row.scheme for row in plan.rows}
    assert {by_name[name] for names in plan.assignment.sensitivity for name in names} == {"int4_g32", "int8_g32"}
    assert all(len({by_name[name] for name in names}) == 1 for names in plan.assignment.sensitivity)
    front = plan.assignment.front
    assert len(front) > 3
    assert [point.kl for point in front] == sorted((point.kl for point in front), reverse=True)
    most = [max(point.nbytes.values()) for point in front]
    assert most == sorted(most)


def test_what_is_sensitive_gets_the_bits(checkpoint: Path, tmp_path: Path) -> None:
    """With one scheme to choose from, the stacks that get it save more for their bytes than those that do not."""
    low, high = (uniform(tmp_path, checkpoint, scheme, ["gguf"]) for scheme in ("int4_g32", "int8_g32"))
    found = []
    for sensitivity in ("estimated", "measured"):
        size = {"size": f"{(low * 2 + high) / 3e6:.6f}MB", "schemes": ["int8_g32"], "sensitivity": sensitivity}
        plan = planned(recipe(tmp_path, checkpoint, size, ["gguf"]))
        assert plan.assignment is not None
        shapes = {row.name: row.shape for row in plan.rows}
        worth: dict[str, list[float]] = {"int4_g32": [], "int8_g32": []}
        for names, kl in plan.assignment.sensitivity.items():
            elements = sum(shapes[name][0] * shapes[name][1] for name in names)
            worth[plan.assignment.schemes[names[0]].name].append(kl / elements)
        assert max(worth["int8_g32"]) > max(worth["int4_g32"])
        found.append(plan.assignment.schemes)
    assert found[0].keys() == found[1].keys()


def test_fixed_roles_keep_their_scheme(checkpoint: Path, tmp_path: Path) -> None:
    schemes = {"default": "int4_g32", "overrides": {"attn_output": "int4_g64", "lm_head": "int8_g32"}}
    budget = {"size": "7bpw", "fixed": ["attn_output", "lm_head"]}
    plan = planned(recipe(tmp_path, checkpoint, budget, ["gguf"], schemes=schemes))
    by_name = {row.name: row.scheme for row in plan.rows}
    assert {by_name[f"blocks.{layer}.attn_output"] for layer in (0, 1)} == {"int4_g64"}
    assert by_name["lm_head"] == "int8_g32"


def test_a_share_is_of_what_the_matrices_take_in_their_own_schemes(checkpoint: Path, tmp_path: Path) -> None:
    """Codes and fp16 scales: 4.5 bits a weight, and 8.5 of the embedding and the head."""
    schemes = {"default": "int4_g32", "overrides": {"embedding": "int8_g32", "lm_head": "int8_g32"}}
    plan = planned(recipe(tmp_path, checkpoint, "110%", ["mlx"], schemes=schemes))
    assert plan.assignment is not None
    bits = {"embedding": 8.5, "lm_head": 8.5}
    own = sum(bits.get(row.name, 4.5) * row.shape[0] * row.shape[1] for row in plan.rows if len(row.shape) == 2) / 8
    taken = plan.layouts[Target.MLX].nbytes
    assert 0.98 * 1.1 * own < taken <= 1.1 * own


def test_bits_a_weight(checkpoint: Path, tmp_path: Path) -> None:
    for bits in (4.6, 6.0):
        plan = planned(recipe(tmp_path, checkpoint, f"{bits}bpw", ["openvino", "mlx"]))
        assert plan.assignment is not None
        assert bits - 1 < plan.assignment.chosen.bits_per_weight <= bits


@pytest.mark.parametrize(("budget", "side"), [("0.01MB", "below the smallest"), ("50MB", "above the largest")])
def test_out_of_reach_names_both_bounds(checkpoint: Path, tmp_path: Path, budget: str, side: str) -> None:
    alternatives = ["int4_g32", "int8_g32"]
    low, high = (uniform(tmp_path, checkpoint, scheme) for scheme in alternatives)
    with pytest.raises(UsageError, match=rf"{side} assignment \(.*budget\.yaml:1\)") as caught:
        planned(recipe(tmp_path, checkpoint, {"size": budget, "schemes": alternatives}))
    # Headers are the shorter, the fewer schemes they name: uniform ones are the bounds.
    assert f"expected {low:,} to {high:,} bytes" in str(caught.value)


def test_bits_out_of_reach(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected 4\.\d+ to 8\.5 bits a weight; found 9"):
        planned(recipe(tmp_path, checkpoint, "9bpw", ["onnx"]))


def test_what_does_not_serve_the_model_is_told_at_its_line(checkpoint: Path, tmp_path: Path) -> None:
    base = recipe(tmp_path, checkpoint, None)
    mine = tmp_path / "mine.yaml"
    cases = {
        "budget: 9bpw": ("above the largest assignment", 2),
        "budget:\n  size: 1bpw": ("below the smallest assignment", 3),
        "budget:\n  size: 5bpw\n  schemes:\n    - int8_g32\n    - q5_0": ("cannot hold q5_0", 6),
        "budget:\n  fixed: [norm, mlp_up]\n  size: 5bpw": ("no matrix is of role norm, which the budget fixes", 3),
        "context: 128\ncalibration:\n  source: text\n  length: 129": ("length is more than the context", 5),
        "method: gptq\ncalibration: {source: text}\nschemes: {default: fp16}": ("no matrix to work on", 2),
        "calibration:\n  source: text\n  sequences: 1\n  length: 9": ("too few tokens to learn from", 5),
    }
    for text, (what, line) in cases.items():
        mine.write_text(f"extends: ./{base.name}\n{text}\n")
        with pytest.raises(UsageError, match=rf"{what}.* \(.*mine\.yaml:{line}\)"):
            planned(mine)


def test_a_scheme_that_a_target_refuses(checkpoint: Path, tmp_path: Path) -> None:
    budget = {"size": "5bpw", "schemes": ["q5_0"]}
    with pytest.raises(UsageError, match=r"cannot hold q5_0.*only GGUF holds"):
        planned(recipe(tmp_path, checkpoint, budget))
    plan = planned(recipe(tmp_path, checkpoint, budget, ["gguf"]))
    assert {row.scheme for row in plan.rows} > {"int4_g32", "q5_0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 92}, r"such as 1\.9GB.*found 92"),
        ({"budget": "92 megabytes"}, r"such as 1\.9GB"),
        ({"budget": {"size": "92MB", "scheme": ["int4_g32"]}}, r"unknown key 'scheme' in budget.*schemes"),
        ({"budget": {"schemes": ["int4_g32"]}}, "missing key 'size' in budget"),
        ({"budget": {"size": "92MB", "schemes": ["q4_k_m"]}}, "a scheme, no mix"),
        ({"budget": {"size": "92MB", "schemes": ["int5"]}}, r"budget\.schemes\.0 \(.*wrong\.yaml:1\); expected one of"),
        ({"budget": {"size": "92MB", "schemes": []}}, "at least 1 of them; found an empty list"),
        ({"budget": {"size": "92MB", "fixed": ["mlp"]}}, r"budget\.fixed\.0.*mlp_up"),
        ({"calibration": {"source": "text", "length": 1}}, r"calibration\.length .*expected 2 or more; found 1"),
        ({"budget": "92MB", "schemes": {"default": "fp16"}}, "needs a scheme to start from"),
        ({"budget": "92MB", "schemes": {"default": "q4_k_m"}, "targets": {"gguf": {}}}, "needs a scheme to start from"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe(write_recipe(tmp_path / "wrong.yaml", tmp_path, **changes))


def test_the_build_records_the_assignment_and_can_be_verified_again(checkpoint: Path, tmp_path: Path) -> None:
    """Through one runtime; the slow test has all four."""
    path = recipe(tmp_path, checkpoint, "5.5bpw", ["gguf"])
    manifest = build(Choices(str(path), out=tmp_path / "out"), QUIET)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert manifest["budget"]["chosen"]["nbytes"] == {"gguf": manifest["targets"]["gguf"]["bytes"]}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Budget" in report and "| chosen |" in report
    again = verify_again(tmp_path / "out", None, None, QUIET)
    assert again["verification"]["gguf"]["passed"]


def test_a_matrix_on_the_grid_is_not_free_in_fewer_bits(checkpoint: Path) -> None:
    """Its own scheme costs nothing, which says nothing of others; those it has are ordered by their error, and are
    about what they are estimated to cost."""
    graph = open_model(Source("tiny", checkpoint), load_recipe(ROOT / "recipes" / "phi35-all-int4.yaml")).graph
    graph = graph.map_weights(lambda weight: replace(weight, scheme=SCHEMES["int8_g32"]))
    name = "blocks.0.mlp_down"
    weight = graph.weights[name]
    stored = dequantize(quantize_rows(weight, 0, weight.shape[0]))
    exact = replace(weight, source=ArraySource(stored))
    on_grid = replace(graph, weights={**graph.weights, name: exact})
    options = [
        _Options((each,), tuple((SCHEMES[scheme],) for scheme in ("int8_g32", "int4_g32", "int4_asym_g32")))
        for each in (name, "blocks.1.mlp_down")
    ]
    ids = np.random.default_rng(0).integers(0, graph.config.vocab_size, (8, 16))
    before, after = (
        _measured_costs(each, options, {}, ids, lambda *what: None, lambda amount: None) for each in (graph, on_grid)
    )
    assert after[0][0] < 1e-9 < after[0][1:].min()  # a last bit of the products may differ with their order
    np.testing.assert_allclose(after[0][1:], before[0][1:], rtol=2)
    np.testing.assert_allclose(after[1], before[1], rtol=0.1)


@pytest.mark.slow
def test_mixed_schemes_in_every_runtime(checkpoint: Path, tmp_path: Path) -> None:
    budget = {"size": "5.5bpw", "schemes": ["int4_g64", "int4_asym_g32", "int8_g32", "int8_channel"]}
    manifest = build(Choices(str(recipe(tmp_path, checkpoint, budget)), out=tmp_path / "out"), QUIET)
    assert {target: result["passed"] for target, result in manifest["verification"].items()} == dict.fromkeys(
        FOUR, True
    )
    assert len({entry["scheme"] for entry in manifest["weights"].values()} - {"fp32"}) > 1


def test_stacks_of_the_tiny_model(checkpoint: Path, tmp_path: Path) -> None:
    made = load_recipe(recipe(tmp_path, checkpoint, "5bpw"))
    graph = open_model(Source("tiny", checkpoint), made).graph
    assert ("blocks.0.attn_q", "blocks.0.attn_k", "blocks.0.attn_v") in stacks(graph)
    assert ("embedding",) in stacks(graph)
