"""What a build would write and need, before it starts: exact bytes, disk, memory and time."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import psutil

from converters.direct_io import CHUNK
from converters.errors import ResourceError, UsageError
from converters.graph import Graph, Weight
from converters.passes.assign import requested_scheme
from converters.quantize.scheme import NumberType
from converters.quantize.sequential import fittable
from exporters.base import Difference, Exporter, Layout, Model, Semantics, Target
from tundish.big_file import KEPT
from tundish.calibrate import Reading, is_calibrated, reading, warm_up_fit
from tundish.calibration_memory import (
    TOKENIZER_ENTRY,
    budget_bytes,
    calibration_bytes,
    interpreter_bytes,
    scratch_bytes,
)
from tundish.digest import LEAF_ROWS
from tundish.disk import disk_errors
from tundish.divergence import ROWS
from tundish.estimate import Time, warm_up
from tundish.pour import BLOCK_ELEMENTS, BLOCKS_AHEAD, row_blocks
from tundish.recipe import Recipe
from tundish.verify import LONG_TAIL, evaluation_shape, long_length, verifying_bytes

if TYPE_CHECKING:  # it brings a solver, which few recipes need
    from tundish.budget import Assignment

# What a thread holds of a block at most, in bytes a number. All have the float32 rows beside those of the checkpoint or
# beside what they are turned into; floats are then copied to be packed, and twice in float32 for their digest.
_INTEGER_BLOCK = 9
_GGML_BLOCK = 12
_FLOAT_BLOCK = 16
_ARRAY_HEADER = 128  # bytes of a .npy file's
_LIVE_LOGITS = 5  # float64 arrays while ROWS positions are compared
_SLACK = 16 << 20  # what the allocator keeps of the memory that arrays had
_JOURNAL_LINE = 256  # bytes of a line of the journal, without the digests of rows
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
    written: int  # beside --out: artifacts, manifest, journal, and the logits of verification
    kept: int  # in the cache: the calibration's codes
    phases: Mapping[str, int]  # peak memory of each phase in this process; a runtime that verifies has its own
    time: Time | None = None  # None: not measured
    compiling: float = 0.0  # seconds in which kernels were compiled, or loaded where they had been
    shortage: ResourceError | None = None  # what this machine lacks for it, where that was asked
    assignment: Assignment | None = None  # what the recipe's budget came to, if it has one
    cached: bool = False  # the calibration
    differences: Mapping[Target, tuple[Difference, ...]] = field(default_factory=dict)
    scratch: int = 0  # in the cache until the calibration is done, and nothing is written beside --out
    remarks: tuple[str, ...] = ()  # on the model, for people

    @property
    def disk(self) -> int:
        """In all, where one disk has both --out and the cache."""
        return max(self.written, self.scratch) + self.kept

    @property
    def memory(self) -> int:
        """The largest of the phases."""
        return max(self.phases.values())

    @property
    def elements(self) -> int:
        """Numbers to quantize: the unit of the pour's progress."""
        return sum(math.prod(row.shape) for row in self.rows)

    def with_cached_calibration(self) -> Plan:
        """The same, with the calibration done."""
        phases = {name: nbytes for name, nbytes in self.phases.items() if name != "calibration"}
        return replace(self, kept=0, scratch=0, phases=phases, cached=True)


def make_plan(
    model: Model, recipe: Recipe, exporters: Mapping[Target, Exporter], threads: int = 1, verified: bool = True
) -> Plan:
    """Ask every exporter of the recipe whether it can hold the model, and for its layout.

    Pours a few rows into nothing: memory is what this process holds with everything loaded, and what the build adds.
    `verified` is whether the build will verify what the recipe says.
    """
    layouts, semantics, differences = {}, {}, {}
    for target, options in recipe.targets.items():
        exporter = exporters[target]
        require_modules(exporter)
        exporter.check(model, options)
        layouts[target] = exporter.layout(model, options)
        semantics[target] = exporter.semantics(model, options)
        differences[target] = exporter.differences(model, options)
    graph = model.graph
    rows = tuple(_row(graph, weight, recipe, layouts) for weight in graph.weights.values())
    read = reading(model, recipe)
    verifying = verified and recipe.verify.enabled
    written = sum(layout.nbytes for layout in layouts.values()) + _MANIFEST_BYTES + _journal_bytes(graph)
    written += verifying_bytes(model, recipe) if verifying else 0  # beside the artifacts, until it is done
    kept, scratch = _kept_bytes(graph, read), scratch_bytes(graph, read)
    calibrated = is_calibrated(graph, recipe)
    start = perf_counter()
    warm_up(graph, layouts, calibrated)
    if read.fitted:
        warm_up_fit(graph, recipe.settled_method)
    compiling = perf_counter() - start
    held = own_memory() + _SLACK
    phases = {"pour": held + _pour_bytes(graph, layouts, threads, calibrated)}
    if read.tokens:
        phases["calibration"] = held + calibration_bytes(graph, read)
    if recipe.budget is not None:
        phases["budget"] = held + budget_bytes(graph, recipe)
    if verifying:
        phases |= {name: held + nbytes for name, nbytes in _verify_phases(model, recipe).items()}
    return Plan(
        layouts,
        rows,
        semantics,
        written,
        kept,
        phases,
        compiling=compiling,
        scratch=scratch,
        differences=differences,
    )


def own_memory() -> int:
    """What this process holds now."""
    held: int = psutil.Process().memory_info().rss
    return held


def _pour_bytes(graph: Graph, layouts: Mapping[Target, Layout], threads: int, calibrated: bool) -> int:
    """What a pour holds at most.

    The blocks of its threads, packed ones that wait for the disk or for their file's digest, and the importances.
    """
    early = KEPT * sum(len(layout.big) for layout in layouts.values())
    importance = sum(weight.shape[-1] * 4 for weight in graph.weights.values()) if calibrated else 0
    return (
        threads * (max(_block_bytes(weight, layouts) for weight in graph.weights.values()) + CHUNK) + early + importance
    )


def _block_bytes(weight: Weight, layouts: Mapping[Target, Layout]) -> int:
    """Of a thread whose blocks are this weight's: one being quantized, BLOCKS_AHEAD packed."""
    places = [place for layout in layouts.values() for place in layout.places[weight.name]]
    start, stop = next(iter(row_blocks(weight, places)))
    kinds = {NumberType.INT: _INTEGER_BLOCK, NumberType.GGML: _GGML_BLOCK}
    row = math.prod(weight.shape[1:]) * kinds.get(weight.scheme.type, _FLOAT_BLOCK)
    return (stop - start) * (row + BLOCKS_AHEAD * sum(place.row_nbytes for place in places))


def _journal_bytes(graph: Graph) -> int:
    """Of tundish.journal at most: the digests of rows, and a line a block."""
    rows = sum(weight.shape[0] for weight in graph.weights.values())
    elements = sum(math.prod(weight.shape) for weight in graph.weights.values())
    return rows // LEAF_ROWS * 32 + (2 * elements // BLOCK_ELEMENTS + len(graph.weights)) * _JOURNAL_LINE


def _kept_bytes(graph: Graph, read: Reading) -> int:
    """Of the codes, scales and zeros that wait for the pour, where layers are fitted."""
    if not read.fitted:
        return 0
    kept = 0
    for weight in fittable(graph):
        rows, width = weight.shape
        groups = width // weight.scheme.group_size_for(width)
        kept += rows * (width + groups * (2 if weight.scheme.symmetric else 3)) + 3 * _ARRAY_HEADER
    return kept


def _verify_phases(model: Model, recipe: Recipe) -> dict[str, int]:
    """What verification holds: the interpreter and the logits of one sequence, then these beside an artifact's."""
    graph, vocabulary = model.graph, model.graph.config.vocab_size
    sequences, length = evaluation_shape(recipe, model)
    long = long_length(model) or 0
    computed = max(interpreter_bytes(graph, sequences, length), interpreter_bytes(graph, 1, long))
    logits = max(length, LONG_TAIL if long else 0) * vocabulary * 4
    tokenizer = vocabulary * TOKENIZER_ENTRY
    compared = min(ROWS, length) * vocabulary * 8 * _LIVE_LOGITS
    return {"reference": tokenizer + computed + logits, "comparison": tokenizer + 2 * logits + compared}


def _row(graph: Graph, weight: Weight, recipe: Recipe, layouts: Mapping[Target, Layout]) -> Row:
    schemes = recipe.schemes
    requested = requested_scheme(graph, weight, schemes.default, schemes.overrides, recipe.calibration.is_on)
    nbytes = {
        target: sum(place.row_nbytes * weight.shape[0] for place in layout.places[weight.name])
        for target, layout in layouts.items()
    }
    name = weight.scheme.name
    return Row(weight.name, weight.shape, name, name if recipe.budget else requested.name, nbytes)


def require_modules(exporter: Exporter) -> None:
    """UsageError naming the pip extra if a library that the export needs is not installed."""
    missing = [name for name in exporter.requires if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"exporting {exporter.target} needs {', '.join(missing)}",
            mend=f"pip install 'tundish[{exporter.extra}]', or leave the target out with --target.",
        )


def disk_of(out: Path) -> Path:
    """The folder to ask about the disk that will hold `out`: the innermost one that exists.

    ResourceError if that cannot be told.
    """
    parent = out.absolute().parent
    with disk_errors(out):
        while not parent.exists():
            parent = parent.parent
    return parent


def shortage_of(plan: Plan, out: Path, cache: Path | None = None, already: int = 0) -> ResourceError | None:
    """What the disk that holds `out` or the free memory lacks for the plan; None if they can take it.

    `cache`: a folder on the disk that takes what is kept of the calibration; None: that of `out` does.
    `already`: bytes of what is to be written that are there, left by a killed build.
    """
    parent = disk_of(out)
    if not os.access(parent, os.W_OK):
        return ResourceError("cannot write", where=str(parent), mend="Choose an --out that you may write to.")
    for folder, nbytes, mend in _disk_needs(plan, parent, cache, already):
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            expected = f"{nbytes:,} bytes free"
            return ResourceError("not enough disk", where=str(folder), expected=expected, found=f"{free:,}", mend=mend)
    available = psutil.virtual_memory().available + own_memory()  # the plan counts what this process holds already
    if available < plan.memory:
        mend = "Use fewer --threads, or verify on a larger machine: --no-verify needs less."
        if plan.memory == plan.phases.get("calibration"):
            mend = "Lower calibration.sequences or calibration.length, or choose a method that fits no matrices."
        return ResourceError("not enough memory", expected=f"{plan.memory:,} bytes", found=f"{available:,}", mend=mend)
    return None


def _disk_needs(plan: Plan, parent: Path, cache: Path | None, already: int) -> Iterator[tuple[Path, int, str]]:
    """A folder on each disk, the bytes that have to be free there, and what to do if they are not."""
    written = max(plan.written - already, 0)
    mend = "Free space, choose another --out, or fewer targets with --target."
    if cache is not None and cache.stat().st_dev != parent.stat().st_dev:
        yield parent, written, mend
        mend = "Free space in the cache, see `tundish cache gc`, or set TUNDISH_CACHE to a folder on another disk."
        yield cache, plan.scratch + plan.kept, mend
        return
    if plan.scratch > written:
        mend = "Free space, or lower calibration.sequences or calibration.length: what they come to is kept."
    yield parent, max(written, plan.scratch) + plan.kept, mend
