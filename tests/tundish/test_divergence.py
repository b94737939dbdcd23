"""KL, top-1 and perplexity against scipy-free definitions."""

from __future__ import annotations

import numpy as np
import pytest

from tundish.divergence import compare_logits


def test_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    reference = np.log(np.stack([p, p])).astype(np.float32) + 3
    artifact = np.log(np.stack([q, p])).astype(np.float32) - 7
    result = compare_logits([(reference, artifact, np.array([2, -1]))])
    first = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert result.kl_mean == pytest.approx(first / 2, abs=1e-6)
    assert result.top1 == 0.5
    assert result.perplexity == pytest.approx(2, rel=1e-6)
    assert result.reference_perplexity == pytest.approx(4, rel=1e-6)
    assert result.positions == 2


def test_against_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((130, 50)).astype(np.float32) * 3 for _ in range(2))
    log_a, log_b = (torch.log_softmax(torch.tensor(values), -1) for values in (a, b))
    expected = torch.nn.functional.kl_div(log_b, log_a, log_target=True, reduction="batchmean")
    result = compare_logits([(a[:70], b[:70], np.full(70, -1)), (a[70:], b[70:], np.full(60, -1))])
    assert result.kl_mean == pytest.approx(float(expected), rel=1e-5)


def test_nan_logits_are_no_agreement() -> None:
    reference = np.zeros((1, 4), np.float32)
    result = compare_logits([(reference, np.full((1, 4), np.nan, np.float32), np.array([0]))])
    assert (result.kl_mean, result.kl_p99, result.top1, result.perplexity) == (None, None, 0, None)
    assert result.reference_perplexity == pytest.approx(4)


@pytest.mark.filterwarnings("error")
def test_infinite_logits_give_no_figure() -> None:
    reference, artifact = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)
    artifact[1, 3] = -np.inf
    result = compare_logits([(reference, artifact, np.array([0, 0]))])
    assert (result.kl_mean, result.kl_p99) == (None, None) and result.top1 == 1
    assert result.perplexity == pytest.approx(np.sqrt(12))


@pytest.mark.filterwarnings("error")
def test_a_perplexity_beyond_floats_is_no_figure() -> None:
    reference = np.array([[0, 1000]], np.float32)
    result = compare_logits([(reference, reference, np.array([0]))])
    assert (result.kl_mean, result.perplexity, result.reference_perplexity) == (0, None, None)
