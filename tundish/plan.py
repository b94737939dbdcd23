"""What a build would write, before any weight is read: exact bytes, disk and memory."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from converters.errors import ResourceError, UsageError
from converters.graph import LOGITS, TOKEN_IDS, Graph, Weight, infer_shapes
from converters.passes.assign import requested_scheme
from exporters.base import Exporter, Layout, Model, Semantics, Target
from tundish.pour import BLOCK_ELEMENTS
from tundish.recipe import CalibrationSource, Recipe
from tundish.verify import evaluation_shape, long_length

# A block's float32 rows, its copies while it is quantized and packed, and the candidate table of the scale search
# (int4 symmetric, the widest: 54 candidates of 4 bytes and 1 zero for each group of 32).
_BYTES_PER_BLOCK_ELEMENT = 24
_PROGRAM_BYTES = 400 << 20  # the interpreter, numpy, numba's compiled kernels and a container's SDK
_LIVE_ACTIVATIONS = 4
_MANIFEST_BYTES = 1 << 20  # manifest.json and report.md, generously


@dataclass(frozen=True, slots=True)
class Row:
    """One weight: its scheme, the one the recipe asked for if that did not fit, and its bytes in each artifact."""

    name: str
    shape: tuple[int, ...]
    scheme: str
    requested: str
    nbytes: Mapping[Target, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a build needs and writes. Bytes, unless said otherwise."""

    layouts: Mapping[Target, Layout]
    rows: tuple[Row, ...]
    semantics: Mapping[Target, Semantics]
    disk: int
    phases: Mapping[str, int]  # peak memory of each phase in this process; a runtime that verifies has its own

    @property
    def memory(self) -> int:
        """The largest of the phases."""
        return max(self.phases.values())

    @property
    def elements(self) -> int:
        """Numbers to quantize: the unit of the pour's progress."""
        return sum(math.prod(row.shape) for row in self.rows)


def make_plan(model: Model, recipe: Recipe, exporters: Mapping[Target, Exporter]) -> Plan:
    """Ask every exporter of the recipe whether it can hold the model, and for its layout."""
    layouts, semantics = {}, {}
    for target, options in recipe.targets.items():
        exporter = exporters[target]
        require_modules(exporter)
        exporter.check(model, options)
        layouts[target] = exporter.layout(model, options)
        semantics[target] = exporter.semantics(model, options)
    graph = model.graph
    rows = tuple(_row(graph, weight, recipe, layouts) for weight in graph.weights.values())
    disk = sum(layout.nbytes for layout in layouts.values()) + _MANIFEST_BYTES
    small = sum(len(data) for layout in layouts.values() for data in layout.small.values())
    fixed = sum(len(data) for layout in layouts.values() for big in layout.big.values() for _, data in big.fixed)
    widest = max(weight.shape[-1] for weight in graph.weights.values())
    held = _PROGRAM_BYTES + small + fixed
    phases = {"pour": held + max(BLOCK_ELEMENTS, widest) * _BYTES_PER_BLOCK_ELEMENT}
    if recipe.calibration.source is not CalibrationSource.NONE:
        phases["calibration"] = held + _interpreter_bytes(graph, recipe.calibration.tokens)
    if recipe.verify.enabled:
        sequences, length = evaluation_shape(recipe, model.context_length)
        tokens = max(sequences * length, long_length(model) or 0)
        logits = tokens // sequences * graph.config.vocab_size * 4  # of one sequence at a time
        phases["reference"] = held + _interpreter_bytes(graph, tokens) + logits
    return Plan(layouts, rows, semantics, disk, phases)


def _interpreter_bytes(graph: Graph, tokens: int) -> int:
    """What the interpreter holds at most: one node's weights in float32 beside a copy as stored, its input and output,
    the residual, and a few temporaries of an activation."""
    weights = max(
        sum(math.prod(graph.weights[name].shape) for name in node.op.weights) for node in graph.nodes if node.op.weights
    )
    features = max(shape[-1] for name, shape in infer_shapes(graph, 1, 1).items() if name not in (TOKEN_IDS, LOGITS))
    return weights * 6 + tokens * features * 4 * _LIVE_ACTIVATIONS


def _row(graph: Graph, weight: Weight, recipe: Recipe, layouts: Mapping[Target, Layout]) -> Row:
    requested = requested_scheme(graph, weight, recipe.schemes.default, recipe.schemes.overrides)
    nbytes = {
        target: sum(place.row_nbytes * weight.shape[0] for place in layout.places[weight.name])
        for target, layout in layouts.items()
    }
    return Row(weight.name, weight.shape, weight.scheme.name, requested.name, nbytes)


def require_modules(exporter: Exporter) -> None:
    """UsageError naming the pip extra if a library that the export needs is not installed."""
    missing = [name for name in exporter.requires if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"exporting {exporter.target} needs {', '.join(missing)}",
            mend=f"pip install 'tundish[{exporter.extra}]', or leave the target out with --target.",
        )


def require_resources(plan: Plan, out: Path) -> None:
    """ResourceError if the disk that holds `out` or the free memory cannot take the plan."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise ResourceError("cannot write", where=str(parent), mend="Choose an --out that you may write to.")
    free = shutil.disk_usage(parent).free
    if free < plan.disk:
        raise ResourceError(
            "not enough disk",
            where=str(parent),
            expected=f"{plan.disk:,} bytes free",
            found=f"{free:,}",
            mend="Free space, choose another --out, or fewer targets with --target.",
        )
    available = psutil.virtual_memory().available
    if available < plan.memory:
        raise ResourceError("not enough memory", expected=f"{plan.memory:,} bytes available", found=f"{available:,}")
