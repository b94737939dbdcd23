"""Bits where they matter: the schemes that cost the least in answers and fit the budget in every container.

The steps: find what schemes each stack of matrices may have (every exporter is asked), what each costs in nats
(converters.quantize.fisher or sensitivity) and in bytes (every exporter's layout), solve (tundish.allocate), lay out
what came of it, and solve again with less room if headers that name schemes took more than was foreseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import ModelError, UsageError
from converters.graph import Graph, Weight
from converters.passes.assign import with_schemes
from converters.quantize.fisher import estimate_costs, use_count
from converters.quantize.scheme import SCHEMES, Scheme, resolve_scheme, stored_bits
from converters.quantize.sensitivity import measure_sensitivity, scheme_error, segment_count, stacks
from converters.quantize.tensor import F32
from converters.role import Role
from exporters.base import Exporter, Layout, Model, Target, TargetOptions
from tundish.allocate import F64, Choice, cheapest, cost_of, size_of, smallest
from tundish.budget_size import BudgetSize
from tundish.recipe_errors import MisfitError

# What stacks may have besides the recipe's default where the recipe lists nothing; those that a target refuses are left
# out. llama.cpp's types are refused by all containers but GGUF.
ALTERNATIVES = (
    *("int4_g128", "int4_g64", "int4_g32", "int4_asym_g32", "int8_channel", "int8_g32"),
    *("q3_k", "iq4_nl", "q4_k", "q5_k", "q6_k"),
)
POINTS = 12  # of the front
# Of what a matrix costs when it is rounded, about what it costs when it is fitted: on the sample 0.2 on text like the
# calibration's, 0.6 on other. An embedding that is no head is not fitted.
FITTED = 0.35
_DIGITS = 4  # of a cost: what is left out is noise of the arithmetic, which would make builds differ
_ATTEMPTS = 8  # at foreseeing how long headers get; each leaves out the bytes that the last one had too many

Stack = tuple[str, ...]
Recall = Callable[[Mapping[str, Any], Callable[[], list[F64]]], list[F64]]
"""The costs f64[options] of each stack; their settings as JSON, and how to find them -> what that comes to."""


@dataclass(frozen=True, slots=True)
class Point:
    """A best assignment: what it is foreseen to cost in nats, and what it takes: bits a weight, bytes by target.

    `counts` is the number of stacks by scheme.
    """

    kl: float
    bits_per_weight: float
    nbytes: Mapping[Target, int]
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a budget came to. `sensitivity`: nats that each stack costs by itself in the recipe's own scheme."""

    budget: str
    chosen: Point
    front: tuple[Point, ...]
    schemes: Mapping[str, Scheme]  # by weight name
    sensitivity: Mapping[Stack, float]

    def as_dict(self) -> dict[str, Any]:
        """For the manifest and `tundish plan --json`."""
        return {
            "budget": self.budget,
            "chosen": asdict(self.chosen),
            "front": [asdict(point) for point in self.front],
            "sensitivity": {names[0]: kl for names, kl in self.sensitivity.items()},
        }


@dataclass(frozen=True, slots=True)
class _Options:
    """The schemes that a stack may have, [option][weight of the stack], the recipe's own first."""

    names: Stack
    schemes: tuple[tuple[Scheme, ...], ...]


class Containers:
    """The exporters of a recipe, asked about one model under many assignments."""

    def __init__(
        self, model: Model, options: Mapping[Target, TargetOptions], exporters: Mapping[Target, Exporter]
    ) -> None:
        self.model, self.options = model, options
        self._exporters = {target: exporters[target] for target in options}

    def refusal(self, schemes: Mapping[str, Scheme]) -> UsageError | ModelError | None:
        """Why a container cannot hold the model with these weights changed; None if all can."""
        changed = replace(self.model, graph=with_schemes(self.model.graph, schemes))
        for target, exporter in self._exporters.items():
            try:
                exporter.check(changed, self.options[target])
            except (UsageError, ModelError) as error:
                return error
        return None

    def layouts(self, schemes: Mapping[str, Scheme]) -> dict[Target, Layout]:
        """The layout of each target with these weights changed."""
        changed = replace(self.model, graph=with_schemes(self.model.graph, schemes))
        return {target: exporter.layout(changed, self.options[target]) for target, exporter in self._exporters.items()}


def assign_by_budget(
    size: BudgetSize,
    alternatives: Sequence[Scheme],
    containers: Containers,
    fixed_roles: frozenset[Role],
    calibrate: Callable[[], Mapping[str, F32]],
    token_ids: NDArray[np.int64],
    measured: bool,
    fitted: Set[str] = frozenset(),
    recall: Recall = lambda settings, find: find(),
    start: Callable[[str, int], None] = lambda text, total: None,
    advance: Callable[[int], None] = lambda amount: None,
) -> Assignment:
    """The schemes of all matrices: least KL within the budget.

    `alternatives`: schemes besides those that the model's graph has; none: ALTERNATIVES, as far as the targets hold
    them. Roles in `fixed_roles` keep the graph's. token_ids: i64[sequences, length], what the model reads while its
    sensitivity is found; calibrate() gives importances f32[in] by weight name, for the quantizer. `measured`: one
    stack after the other is quantized and the KL taken, which takes a run of the model each; else it is estimated.
    `fitted`: weights whose codes will be fitted to text, which costs less than rounding them. `recall` may know the
    costs from an earlier time.

    MisfitError if a container refuses an alternative, no matrix has a fixed role, or the budget is outside what
    assignments take.
    """
    graph = containers.model.graph
    _require_roles(graph, fixed_roles)
    options = _find_options(containers, alternatives, fixed_roles, fitted)
    fixed, sizes = _sizes(containers, options)
    costless = [Choice(np.zeros(len(each)), each) for each in sizes]
    bounds = _Bounds(containers, options, fixed)
    if size.share is not None:
        own_bits = sum(float(bits[0]) for bits in bounds.bits)
        size = replace(size, nbytes=int(size.share * own_bits / 8))
    low = smallest(costless, fixed)
    high = [int(np.argmax([_bits(graph, each.names, schemes) for schemes in each.schemes])) for each in options]
    bounds.require(size, low, high)

    def find() -> list[F64]:
        costs = _measured_costs if measured else _estimated_costs
        return costs(graph, options, calibrate(), token_ids, start, advance)

    stored = [[[scheme.name for scheme in schemes] for schemes in each.schemes] for each in options]
    settings = {
        "method": "measured" if measured else "estimated",
        "long_factors": graph.config.rope.long,
        "stacks": [[list(each.names), schemes] for each, schemes in zip(options, stored, strict=True)],
    }
    costs = [
        cost * (FITTED if fitted and fitted >= {*each.names} else 1)
        for each, cost in zip(options, recall(settings, find), strict=True)
    ]
    choices = [Choice(each, own) for each, own in zip(costs, sizes, strict=True)]
    chosen = _within(size, choices, fixed, bounds)
    front = _front(choices, fixed, bounds, low, high)
    own = {each.names: float(cost[0]) for each, cost in zip(options, costs, strict=True)}
    return Assignment(str(size), bounds.point(choices, chosen, exact=True), front, bounds.schemes(chosen), own)


def _require_roles(graph: Graph, fixed_roles: frozenset[Role]) -> None:
    """MisfitError if no matrix has a role that is to keep its scheme."""
    present = {role for names in stacks(graph) for role in _roles(graph, [graph.weights[name] for name in names])}
    if absent := fixed_roles - present:
        raise MisfitError(
            f"no matrix is of role {', '.join(sorted(role.value for role in absent))}, which the budget fixes",
            ("budget", "fixed"),
            expected="some of " + ", ".join(sorted(role.value for role in present)),
            mend="Leave it out: norms keep their floats in any case.",
        )


def _find_options(
    containers: Containers, alternatives: Sequence[Scheme], fixed_roles: frozenset[Role], fitted: Set[str]
) -> list[_Options]:
    """What every stack may have; by default, no scheme that cannot be fitted where it is to be. A container is asked
    once for all stacks of the same roles and width."""
    graph = containers.model.graph
    refusals: dict[object, UsageError | ModelError | None] = {}
    found = []
    for names in stacks(graph):
        weights = [graph.weights[name] for name in names]
        options = [tuple(weight.scheme for weight in weights)]
        if fixed_roles.isdisjoint(_roles(graph, weights)):
            for scheme in alternatives or [SCHEMES[name] for name in ALTERNATIVES]:
                schemes = tuple(resolve_scheme(scheme, weight.shape[-1]) for weight in weights)
                if not alternatives and fitted >= {*names} and not all(each.is_integer for each in schemes):
                    continue
                kind = tuple(weight.role for weight in weights), weights[0].shape[-1], schemes
                if kind not in refusals:
                    refusals[kind] = containers.refusal(dict(zip(names, schemes, strict=True)))
                refusal = refusals[kind]
                if refusal is not None and alternatives:
                    raise MisfitError(
                        f"a target cannot hold {scheme.name}, which the budget lists",
                        ("budget", "schemes", alternatives.index(scheme)),
                        found=str(refusal),
                        mend="Leave it out of budget.schemes, or the target out of the recipe.",
                    ) from refusal
                if refusal is None and schemes not in options:
                    options.append(schemes)
        found.append(_Options(names, tuple(options)))
    return found


def _roles(graph: Graph, weights: Sequence[Weight]) -> frozenset[Role]:
    """A tied embedding is the head as well."""
    roles = {weight.role for weight in weights}
    if Role.EMBEDDING in roles and graph.config.tie_embeddings:
        roles.add(Role.LM_HEAD)
    return frozenset(roles)


def _sizes(containers: Containers, options: Sequence[_Options]) -> tuple[F64, list[F64]]:
    """Bytes by target: f64[targets] of all that is no matrix, and f64[options, targets] of each stack.

    The n-th layout has every stack in its n-th option, or its first if it has fewer.
    """
    sizes = [np.zeros((len(each.schemes), len(containers.options))) for each in options]
    fixed: F64 = np.zeros(len(containers.options))
    for option in range(max(len(each.schemes) for each in options)):
        taken = [option if option < len(each.schemes) else 0 for each in options]
        layouts = containers.layouts(_named(options, taken))
        for column, layout in enumerate(layouts.values()):
            for each, own, index in zip(options, sizes, taken, strict=True):
                own[index, column] = _nbytes(containers.model.graph, layout, each.names)
            if option == 0:
                fixed[column] = layout.nbytes - sum(own[0, column] for own in sizes)
    return fixed, sizes


def _nbytes(graph: Graph, layout: Layout, names: Stack) -> int:
    return sum(place.row_nbytes * graph.weights[name].shape[0] for name in names for place in layout.places[name])


def _named(options: Sequence[_Options], chosen: Sequence[int]) -> dict[str, Scheme]:
    """The schemes of the chosen options by weight name."""
    return {
        name: scheme
        for each, option in zip(options, chosen, strict=True)
        for name, scheme in zip(each.names, each.schemes[option], strict=True)
    }


def _measured_costs(
    graph: Graph,
    options: Sequence[_Options],
    importance: Mapping[str, F32],
    token_ids: NDArray[np.int64],
    start: Callable[[str, int], None],
    advance: Callable[[int], None],
) -> list[F64]:
    """f64[options] of each stack, in nats: measured for its first, for others by the ratio of squared errors; where the
    first has none, others are estimated."""
    start("measuring what each matrix costs in fewer bits", segment_count(graph) + len(options))
    measured = measure_sensitivity(graph, token_ids, importance, advance)
    found = []
    exact = []
    for each in options:
        errors = [
            sum(
                scheme_error(graph.weights[name], scheme, importance.get(name)) * graph.weights[name].shape[0]
                for name, scheme in zip(each.names, schemes, strict=True)
            )
            for schemes in each.schemes
        ]
        kl = measured[each.names]
        found.append(_rounded([kl * error / errors[0] if errors[0] else kl for error in errors]))
        if not errors[0] and any(errors):
            exact.append(each)
        advance(1)
    if exact:  # weights that lie on the first scheme's grid: nothing was measured that a ratio could be taken of
        estimates = _estimated_costs(graph, exact, importance, token_ids, start, advance)
        by_names = {each.names: costs[1:] for each, costs in zip(exact, estimates, strict=True)}
        for each, costs in zip(options, found, strict=True):
            costs[1:] = by_names.get(each.names, costs[1:])
    return found


def _estimated_costs(
    graph: Graph,
    options: Sequence[_Options],
    importance: Mapping[str, F32],
    token_ids: NDArray[np.int64],
    start: Callable[[str, int], None],
    advance: Callable[[int], None],
) -> list[F64]:
    """f64[options] of each stack, in nats: the sum of its weights' second-order estimates."""
    start("estimating what each matrix costs in fewer bits", use_count(graph))
    schemes = {
        name: [option[place] for option in each.schemes] for each in options for place, name in enumerate(each.names)
    }
    costs = estimate_costs(graph, token_ids, schemes, importance, advance=advance)
    return [_rounded(np.sum([costs[name] for name in each.names], axis=0)) for each in options]


def _rounded(costs: Iterable[float]) -> F64:
    return np.array([float(f"{cost:.{_DIGITS}g}") for cost in costs])


def _bits(graph: Graph, names: Stack, schemes: Sequence[Scheme]) -> float:
    """Bits of a stack, as its schemes count them: what no container needs is left out."""
    return sum(
        stored_bits(scheme, graph.weights[name].shape[-1]) * math.prod(graph.weights[name].shape)
        for name, scheme in zip(names, schemes, strict=True)
    )


class _Bounds:
    """Assignments by their chosen options: what they take, and whether that is in a budget's reach."""

    def __init__(self, containers: Containers, options: Sequence[_Options], fixed: F64) -> None:
        self.containers, self.options, self.fixed = containers, options, fixed
        self._exact: dict[tuple[int, ...], dict[Target, int]] = {}
        graph = containers.model.graph
        self.elements = sum(math.prod(graph.weights[name].shape) for each in options for name in each.names)
        self.bits = [
            np.array([_bits(graph, each.names, schemes) for schemes in each.schemes], np.float64) for each in options
        ]

    def schemes(self, chosen: Sequence[int]) -> dict[str, Scheme]:
        """By weight name."""
        return _named(self.options, chosen)

    def exact(self, chosen: Sequence[int]) -> dict[Target, int]:
        """Bytes by target, of an artifact's folder."""
        key = tuple(chosen)
        if key not in self._exact:
            layouts = self.containers.layouts(self.schemes(chosen))
            self._exact[key] = {target: layout.nbytes for target, layout in layouts.items()}
        return self._exact[key]

    def bits_per_weight(self, chosen: Sequence[int]) -> float:
        return float(sum(bits[option] for bits, option in zip(self.bits, chosen, strict=True)) / self.elements)

    def require(self, size: BudgetSize, low: Sequence[int], high: Sequence[int]) -> None:
        """MisfitError that names both bounds if the budget is outside."""
        least: float
        most: float
        asked: float
        if size.nbytes is not None:
            least, most = (max(self.exact(chosen).values()) for chosen in (low, high))
            asked, unit, shown = size.nbytes, "bytes for the largest artifact", "{:,}"
        else:
            fewest = [int(np.argmin(bits)) for bits in self.bits]
            assert size.bits_per_weight is not None
            least, most = self.bits_per_weight(fewest), self.bits_per_weight(high)
            asked, unit, shown = size.bits_per_weight, "bits a weight", "{:.4g}"
        if not least <= asked <= most:
            raise MisfitError(
                f"the budget of {size} is {'below the smallest' if asked < least else 'above the largest'} assignment",
                ("budget", "size"),
                expected=f"{shown.format(least)} to {shown.format(most)} {unit}",
                found=shown.format(asked),
                mend="Change the budget, or give other schemes in budget.schemes.",
            )

    def point(self, choices: Sequence[Choice], chosen: Sequence[int], exact: bool = False) -> Point:
        """`exact`: headers are laid out, too; else they are as long as in the recipe's own schemes."""
        about = zip(self.containers.options, size_of(choices, chosen) + self.fixed, strict=True)
        nbytes = self.exact(chosen) if exact else {target: round(size) for target, size in about}
        counts: dict[str, int] = {}
        for each, option in zip(self.options, chosen, strict=True):
            name = "+".join(dict.fromkeys(scheme.name for scheme in each.schemes[option]))
            counts[name] = counts.get(name, 0) + 1
        cost = float(f"{cost_of(choices, chosen):.{_DIGITS}g}")
        return Point(cost, round(self.bits_per_weight(chosen), 4), nbytes, dict(sorted(counts.items())))


def _within(size: BudgetSize, choices: Sequence[Choice], fixed: F64, bounds: _Bounds) -> list[int]:
    """The best assignment that takes no more than the budget, headers and all."""
    if size.bits_per_weight is not None:
        counted = [Choice(each.costs, bits[:, None]) for each, bits in zip(choices, bounds.bits, strict=True)]
        found = cheapest(counted, np.array([size.bits_per_weight * bounds.elements]))
        return found if found is not None else [int(np.argmin(bits)) for bits in bounds.bits]
    assert size.nbytes is not None
    limits = size.nbytes - fixed
    for _ in range(_ATTEMPTS):
        found = cheapest(choices, limits)
        if found is None:
            break
        excess = np.array(list(bounds.exact(found).values())) - size.nbytes
        if (excess <= 0).all():
            return found
        limits = limits - np.maximum(excess, 0)
    return smallest(choices, fixed)  # within headers' length of the lower bound, which is within the budget


def _front(
    choices: Sequence[Choice], fixed: F64, bounds: _Bounds, low: Sequence[int], high: Sequence[int]
) -> tuple[Point, ...]:
    """Best assignments from the smallest to the largest: none of them is smaller and costs less than another."""
    least, most = (float((size_of(choices, chosen) + fixed).max()) for chosen in (low, high))
    points: list[Point] = []
    for limit in np.linspace(least * (1 + 1e-5), most * (1 + 1e-5), POINTS):
        chosen = cheapest(choices, limit - fixed)
        if chosen is not None:
            point = bounds.point(choices, chosen)
            if not points or point.kl < points[-1].kl:
                points.append(point)
    return tuple(points)
