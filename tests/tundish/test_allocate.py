"""The integer program, against trying every assignment."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tundish.allocate import Choice, cheapest, cost_of, size_of, smallest


def problem(seed: int) -> list[Choice]:
    random = np.random.default_rng(seed)
    return [
        Choice(random.lognormal(-5, 1, options), random.integers(100, 1000, (options, 2)).astype(np.float64))
        for options in (3, 1, 4, 2, 3, 3)
    ]


def every(choices: list[Choice]) -> list[tuple[int, ...]]:
    return list(product(*(range(len(choice.costs)) for choice in choices)))


@pytest.mark.parametrize("seed", range(8))
def test_the_cheapest_that_fits_all_limits(seed: int) -> None:
    choices = problem(seed)
    limits = np.quantile([size_of(choices, each) for each in every(choices)], 0.2, axis=0)
    best = min(cost_of(choices, each) for each in every(choices) if (size_of(choices, each) <= limits).all())
    found = cheapest(choices, limits)
    assert found is not None and (size_of(choices, found) <= limits).all()
    assert best <= cost_of(choices, found) <= best * 1.001


@pytest.mark.parametrize("seed", range(8))
def test_the_smallest_largest_sum(seed: int) -> None:
    choices, fixed = problem(seed), np.array([0.0, 300.0])
    best = min((size_of(choices, each) + fixed).max() for each in every(choices))
    assert (size_of(choices, smallest(choices, fixed)) + fixed).max() == best
    assert cheapest(choices, np.full(2, best) - fixed - 1) is None, "nothing is smaller"


def test_costs_may_all_be_zero() -> None:
    choices = [Choice(np.zeros(2), np.array([[2.0], [1.0]]))] * 3
    found = cheapest(choices, np.array([3.5]))
    assert found is not None and size_of(choices, found) <= 3.5
