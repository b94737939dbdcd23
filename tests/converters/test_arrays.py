"""torch's products against numpy's: exact where they must be, close elsewhere; and who is chosen when."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.arrays import NUMPY, Products, computing_by, products, products_on
from converters.errors import ResourceError, UsageError
from converters.graph import Graph
from converters.interpret import interpret
from converters.load import load_graph
from converters.passes.assign import assign_schemes
from converters.quantize.awq import find_scales
from converters.quantize.fisher import estimate_costs
from converters.quantize.gptq import quantize_gptq
from converters.quantize.scheme import SCHEMES
from converters.quantize.sensitivity import measure_sensitivity
from converters.quantize.tensor import F32
from tests.converters.tiny_models import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
TORCH = products_on("cpu")
INT4 = SCHEMES["int4_g32"]


class Counting:
    """numpy's products, and how often each was asked for."""

    name = "counting"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> object:
        self.asked.append(name)
        return getattr(NUMPY, name)


def normal(*shape: int) -> F32:
    return RNG.standard_normal(shape).astype(np.float32)


def small(*shape: int) -> F32:
    return RNG.integers(-8, 9, shape).astype(np.float32)


def linear(by: Products, x: F32, *weights: F32) -> F32:
    out = np.empty((len(x), sum(map(len, weights))), np.float32)
    by.linear(x, iter(weights), out)
    return out


def test_products_of_small_integers_are_equal() -> None:
    a, b = small(37, 64), small(64, 29)
    assert np.array_equal(TORCH.product(a, b), a @ b)
    assert np.array_equal(TORCH.product(a.T, a), a.T @ a)  # one array, seen twice
    assert np.array_equal(TORCH.product(a[:, ::2], b[::2]), a[:, ::2] @ b[::2])
    weights = small(5, 64), small(1, 64), small(11, 64)
    assert np.array_equal(linear(TORCH, a, *weights), a @ np.concatenate(weights).T)
    assert np.array_equal(linear(NUMPY, a, *weights), a @ np.concatenate(weights).T)


def test_products_are_close_and_attention_is_the_references() -> None:
    a, b = normal(60, 128), normal(128, 40)
    np.testing.assert_allclose(TORCH.product(a, b), a @ b, rtol=1e-4, atol=1e-5)
    q, k, v = normal(3, 10, 16), normal(14, 16), normal(14, 16)
    mask = np.where(np.arange(14) <= np.arange(10)[:, None] + 4, 0, -np.inf).astype(np.float32)
    np.testing.assert_allclose(TORCH.attend(q, k, v, mask), NUMPY.attend(q, k, v, mask), rtol=1e-4, atol=1e-6)


def test_what_is_only_read_is_no_reason_to_warn(recwarn: pytest.WarningsRecorder) -> None:
    a = normal(4, 4)
    a.flags.writeable = False
    TORCH.product(a, a)
    assert not recwarn.list


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return assign_schemes(load_graph(make_checkpoint("phi3_medium_gqa", tmp_path_factory.mktemp("model"))), INT4, {})


def test_models_and_quantizers_compute_by_them(graph: Graph) -> None:
    """Every heavy step asks for products, and comes to the same by torch's."""
    token_ids = np.random.default_rng(1).integers(0, graph.config.vocab_size, (2, 24))
    schemes = {name: [INT4] for name, weight in graph.weights.items() if len(weight.shape) == 2}
    weight, x = normal(48, 64), normal(200, 64)
    moments = {"hessian": x.T @ x, "cross": x.T @ (x + normal(200, 64) / 10)}

    def results() -> list[F32]:
        sensitivity = measure_sensitivity(graph, token_ids, {})
        return [
            interpret(graph, token_ids),
            np.concatenate(list(find_scales(graph, token_ids).values())),
            np.concatenate(list(estimate_costs(graph, token_ids, schemes, {}).values())),
            np.array(list(sensitivity.values())),
            quantize_gptq(weight, moments["hessian"], INT4, moments["cross"]).dequantize(),
        ]

    counting = Counting()
    with computing_by(counting):  # type: ignore[arg-type]
        expected = results()
    assert {*counting.asked} >= {"product", "linear", "attend"}
    with computing_by(TORCH):
        found = results()
    for ours, theirs in zip(found[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-5)
    assert np.mean(found[-1] == expected[-1]) > 0.99  # a code may round the other way


def test_the_choice_is_the_threads_own_and_ends() -> None:
    with ThreadPoolExecutor(1) as pool, computing_by(TORCH):
        assert products() is TORCH and pool.submit(products).result() is NUMPY
        with computing_by(NUMPY):
            assert products() is NUMPY
        assert products() is TORCH
    assert products() is NUMPY is products_on(None)
    assert TORCH.name == f"torch {torch.__version__} cpu"


@pytest.mark.parametrize("device", ["meta", "no_such", "", "cuda:99", "cpu:-2"])
def test_a_device_that_does_not_compute_is_told(device: str) -> None:
    with pytest.raises(UsageError, match=r"torch cannot compute on the device.*--device"):
        products_on(device)


def test_a_device_out_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(torch, "from_numpy", full)
    with pytest.raises(ResourceError, match=r"not enough memory.*tried to allocate 2 GiB\."):
        TORCH.product(normal(2, 2), normal(2, 2))


def test_without_torch_a_device_is_a_usage_error_and_nothing_else_asks_for_it() -> None:
    code = """
import sys
sys.modules["torch"] = None
from converters.arrays import products_on
from tundish.cli import main
assert products_on(None).name == "numpy"
sys.argv[1:] = ["plan", "phi35-mobile-int4", "--device", "cuda"]
main()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "device cuda needs torch" in run.stderr and "tundish[torch]" in run.stderr
