"""How far an artifact's next-token distributions are from the reference's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.quantize.tensor import F32

ROWS = 64  # positions at a time: bounds the float64 temporaries


@dataclass(frozen=True, slots=True)
class Divergence:
    """Over all compared positions: mean and 99th percentile of KL(reference || artifact) in nats, the fraction of
    positions with the same most likely token, and the perplexity of each on the text (None without next tokens).

    None is a figure, too, that is no finite number, as logits come to that are infinite or NaN.
    """

    kl_mean: float | None
    kl_p99: float | None
    top1: float
    perplexity: float | None
    reference_perplexity: float | None
    positions: int


@np.errstate(invalid="ignore", over="ignore")  # what comes of it is told as None
def compare_logits(pairs: Iterable[tuple[F32, F32, NDArray[np.int64]]]) -> Divergence:
    """Compare (reference f32[length, vocab], artifact f32[length, vocab], next token ids i64[length]) of each sequence.

    A next token of -1 (nothing follows) is left out of the perplexities.
    """
    kl: list[NDArray[np.float64]] = []
    same: list[NDArray[np.bool_]] = []
    losses: list[NDArray[np.float64]] = []
    for reference, artifact, following in pairs:
        for start in range(0, len(reference), ROWS):
            rows = slice(start, start + ROWS)
            log_p, log_q = _log_softmax(reference[rows]), _log_softmax(artifact[rows])
            kl.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
            agreed = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
            same.append(agreed & ~np.isnan(kl[-1]))  # NaN counts as the largest
            known = np.flatnonzero(following[rows] >= 0)
            target = following[rows][known]
            losses.append(np.stack([-log_p[known, target], -log_q[known, target]], axis=-1))
    divergences = np.concatenate(kl)
    loss = np.concatenate(losses)
    perplexities = [_finite(value) for value in np.exp(loss.mean(axis=0))] if len(loss) else [None, None]
    return Divergence(
        kl_mean=_finite(divergences.mean()),
        kl_p99=_finite(np.quantile(divergences, 0.99)),
        top1=float(np.concatenate(same).mean()),
        perplexity=perplexities[1],
        reference_perplexity=perplexities[0],
        positions=len(divergences),
    )


def _finite(value: np.floating[Any]) -> float | None:
    return float(value) if math.isfinite(value) else None


def _log_softmax(logits: F32) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
