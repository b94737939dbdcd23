"""Which scheme each matrix has: the recipe's by role, or what its budget comes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converters.passes.assign import with_schemes
from converters.quantize.block import blaming_weights
from converters.quantize.scheme import scheme_named
from converters.quantize.sequential import fittable
from exporters.base import Model
from exporters.registry import EXPORTERS
from tundish.calibrate import (
    SENSITIVITY_TOKENS,
    calibration_ids,
    known_importance,
    known_importance_key,
    origin_of,
    title_of,
)
from tundish.calibration_text import digest
from tundish.cost_cache import CostMemory
from tundish.plan import require_modules
from tundish.recipe import CalibrationSource, Recipe, Sensitivity

if TYPE_CHECKING:  # it brings a solver, which few recipes need
    from tundish.budget import Assignment


def settle_schemes(
    model: Model,
    recipe: Recipe,
    memory: CostMemory,
    start: Callable[[str, int], None],
    advance: Callable[[int], None],
) -> tuple[Model, Assignment | None]:
    """The model with the schemes that the recipe's budget chooses; as it is without one.

    `memory` knows costs that were found before. `start` is told what begins and the count that `advance` then reaches.
    UsageError if a target refuses a scheme of the budget, or the budget is out of reach.
    """
    if recipe.budget is None:
        return model, None
    from tundish.budget import Containers, assign_by_budget

    for target in recipe.targets:
        require_modules(EXPORTERS[target])
    token_ids, text = _sensitivity_text(model, recipe)
    settings = {"token_ids_sha256": digest(token_ids), "importance": known_importance_key(model, recipe)}
    with blaming_weights(model.graph):
        assignment = assign_by_budget(
            recipe.budget.parsed,
            recipe.budget.schemes or (),
            Containers(model, recipe.targets, EXPORTERS),
            frozenset(recipe.budget.fixed),
            lambda: known_importance(model, recipe),
            token_ids,
            recipe.budget.sensitivity is Sensitivity.MEASURED,
            frozenset(weight.name for weight in fittable(model.graph)) if recipe.settled_method.fits else frozenset(),
            partial(memory.recall, model.name, text, settings),
            start,
            advance,
        )
    return replace(model, graph=with_schemes(model.graph, assignment.schemes)), assignment


def _sensitivity_text(model: Model, recipe: Recipe) -> tuple[NDArray[np.int64], str]:
    """What the model reads while it is found what its matrices cost, and what that is called: some of its calibration
    text, or random tokens."""
    sequences, length = SENSITIVITY_TOKENS
    if recipe.calibration.source in (CalibrationSource.TEXT, CalibrationSource.DATASET):
        origin = origin_of(recipe.calibration)
        return calibration_ids(model, recipe.calibration, origin, sequences, length), title_of(origin)
    random = np.random.default_rng(recipe.calibration.seed)
    return random.integers(0, model.graph.config.vocab_size, (sequences, length)), "random tokens"


def with_recorded_schemes(model: Model, recipe: Recipe, manifest: Mapping[str, Any]) -> Model:
    """The model with the schemes of the manifest's weights, where a budget chose them."""
    if recipe.budget is None:
        return model
    schemes = {name: scheme_named(entry["scheme"]) for name, entry in manifest["weights"].items()}
    return replace(model, graph=with_schemes(model.graph, schemes))
