"""What a recipe's calibration finds out before the pour: importances of columns, and the codes that GPTQ chose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.dataset import Dataset
from converters.errors import ModelError
from converters.file_digest import sha256_of
from converters.graph import Graph, Weight
from converters.ops import Linear
from converters.passes.fold import fold_scales
from converters.quantize.adaround import ADAROUND_STEPS, refine_adaround
from converters.quantize.awq import find_scales
from converters.quantize.block import Rounding, blaming_weights, quantize_rows, read_rows
from converters.quantize.codes import CodeStore
from converters.quantize.gptq import quantize_gptq
from converters.quantize.hqq import quantize_hqq
from converters.quantize.importance import random_token_importance
from converters.quantize.refinement import Refine
from converters.quantize.rtn import quantize_rtn
from converters.quantize.sequential import Moments, fittable, quantize_sequentially
from converters.quantize.signround import SIGNROUND_STEPS, refine_signround
from converters.quantize.stream import Store
from converters.quantize.tensor import F32, QuantTensor, Tensor
from exporters.base import Model
from tundish.calibration_progress import Workplace
from tundish.calibration_text import Documentation, Files, Origin, OwnText, calibration_sequences, digest, name_of
from tundish.recipe import Calibration, CalibrationSource, Method, Recipe
from tundish.recipe_errors import MisfitError
from tundish.user_path import expanded

FIT_ELEMENTS = 1 << 25  # of a matrix that are fitted at once: rows do not depend on one another, and memory is dear
_REFINE: Mapping[Method, Refine] = {
    Method.GPTQ_ADAROUND: refine_adaround,
    Method.GPTQ_SIGNROUND: refine_signround,
}
_STEPS = {Method.GPTQ_ADAROUND: ADAROUND_STEPS, Method.GPTQ_SIGNROUND: SIGNROUND_STEPS}
CHECKED = 1 << 18  # tokens of text that are looked at before a plan is made
SENSITIVITY_TOKENS = 8, 64  # sequences, tokens of each: each is one draw for the gradients of a budget's estimate

Record = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What quantizing needs to know: importance f32[in] by weight name, and matrices that are quantized already.

    `graph` is what is quantized: the model's, or one that computes the same with columns scaled by `scales`. `record`
    is what the manifest says of it; None without calibration.
    """

    graph: Graph
    importance: Mapping[str, F32] = field(default_factory=dict)
    codes: CodeStore | None = None
    record: Record | None = None
    rounding: Rounding = quantize_rtn
    scales: Mapping[str, F32] = field(default_factory=dict)

    def quantize(self, weight: Weight, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a weight under its scheme. ModelError as converters.quantize.block.quantize_rows."""
        if self.codes is not None and weight.name in self.codes:
            return self.codes.rows(weight.name, start, stop)
        return quantize_rows(weight, start, stop, self.importance.get(weight.name), self.rounding)


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Where a text comes from, and its tokens i64[sequences, length]; None where the model is to write them."""

    origin: Origin
    token_ids: NDArray[np.int64] | None


@dataclass(frozen=True, slots=True)
class Findings:
    """What reading a text came to, which is worth keeping: it takes minutes to hours.

    importance: f32[in] by weight name; scales: what passes.fold.fold_scales takes; codes: of matrices that were fitted.
    """

    token_ids_sha256: str
    importance: Mapping[str, F32]
    scales: Mapping[str, F32]
    codes: CodeStore | None


Find = Callable[[Workplace], Findings]
"""Has the model read; codes stay in the place given, where an earlier process may have begun."""
Keep = Callable[[Find], Findings]
"""The findings, which may have been kept from an earlier time. Their codes stay until they are poured."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model reads for calibration: sequences of so many tokens, together or one at a time.

    `together`: a layer reads them all before the next begins; `scaled`: the float model reads them before, to scale
    columns; `fitted`: layers are fitted to them, and so many `steps` then go over each matrix of few bits.
    """

    sequences: int
    length: int
    together: bool = False
    scaled: bool = False
    fitted: bool = False
    steps: int = 0

    @property
    def tokens(self) -> int:
        """In all."""
        return self.sequences * self.length


NOTHING = Reading(0, 0)


def is_calibrated(graph: Graph, recipe: Recipe) -> bool:
    """Whether the quantizer gets importances: the recipe asks for them, and there is something to quantize."""
    return recipe.calibration.is_on and any(weight.scheme.is_quantized for weight in graph.weights.values())


def reading(model: Model, recipe: Recipe) -> Reading:
    """What the recipe has the model read; nothing if it asks for none, or if no weight is quantized.

    MisfitError if a method is asked for and no matrix has an integer scheme, or if sequences exceed the context.
    """
    method = recipe.settled_method
    if method is not Method.RTN and not fittable(model.graph):
        raise MisfitError(
            f"method {recipe.method} has no matrix to work on",
            ("method",),
            expected="an integer scheme, such as int4_g32",
            found="schemes " + ", ".join(sorted({weight.scheme.name for weight in model.graph.weights.values()})),
            mend="Leave method out: floats stay what they are, and llama.cpp's block types are rounded with the "
            "calibration's importances.",
        )
    return reading_asked(model, recipe) if is_calibrated(model.graph, recipe) else NOTHING


def reading_asked(model: Model, recipe: Recipe) -> Reading:
    """What the recipe has a model read if weights are to be quantized. UsageError as `reading`."""
    calibration, method = recipe.calibration, recipe.settled_method
    match calibration.source:
        case CalibrationSource.RANDOM_TOKENS:
            return Reading(1, calibration.tokens)
        case CalibrationSource.TEXT | CalibrationSource.DATASET | CalibrationSource.SELF:
            if calibration.length > model.context_length:
                raise MisfitError(
                    "calibration.length is more than the context",
                    ("calibration", "length"),
                    expected=f"at most {model.context_length} tokens",
                    found=str(calibration.length),
                )
            sequences, length = calibration.sequences, calibration.length
            steps = _STEPS.get(method, 0)
            return Reading(sequences, length, together=True, scaled=method.scales, fitted=method.fits, steps=steps)
        case _:
            return NOTHING


def warm_up_fit(graph: Graph, method: Method) -> None:
    """Load the kernels that fit matrices, or compile them, by fitting a few numbers under each scheme."""
    for scheme in {weight.scheme.name: weight.scheme for weight in fittable(graph)}.values():
        width = 2 * (scheme.group_size or 32)
        weight, hessian = np.ones((1, width), np.float32), np.eye(width, dtype=np.float32)
        quantize_gptq(weight, hessian, scheme, refine=_REFINE.get(method))


def calibration_text(
    model: Model, recipe: Recipe, say: Callable[[str], None] = lambda text: None
) -> CalibrationText | None:
    """The text that the recipe has the model read, if it does. UsageError says what is wrong with it; `say` is told if
    not all of it is looked at."""
    read = reading(model, recipe)
    if not read.together:
        return None
    origin = origin_of(recipe.calibration)
    if isinstance(origin, OwnText):
        return CalibrationText(origin, None)
    token_ids = calibration_ids(model, recipe.calibration, origin, read.sequences, read.length, say=say)
    return CalibrationText(origin, token_ids)


def check_calibration(model: Model, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Refuse what calibration_text and calibrate would refuse, as far as that shows within seconds: a dataset is looked
    for and not read, and of a long calibration CHECKED tokens are. `say` as there."""
    read, calibration = reading(model, recipe), recipe.calibration
    if calibration.source is CalibrationSource.IMATRIX and is_calibrated(model.graph, recipe):
        _calibrate_by_matrix(model, Path(calibration.file or ""), lambda text: None)
    if not read.together:
        return
    origin = origin_of(calibration)
    if isinstance(origin, Files | Documentation):
        sequences = min(read.sequences, max(1, CHECKED // read.length))
        calibration_ids(model, calibration, origin, sequences, read.length, say=say)


def calibrate(
    model: Model,
    recipe: Recipe,
    text: CalibrationText | None,
    keep: Keep,
    say: Callable[[str], None],
    start: Callable[[str, int], None],
    advance: Callable[[int], None],
) -> Calibrated:
    """Do what the recipe asks for. `text` is what calibration_text gave, `keep` knows what was found in it before.

    `say` is told what begins; `start` the number of elements that `advance` then counts. ModelError names a weight that
    is not finite, or a layer that computes no finite values or cannot be fitted; UsageError says what is wrong with a
    text or an importance matrix.
    """
    with blaming_weights(model.graph):
        calibration, read = recipe.calibration, reading(model, recipe)
        rounding = quantize_hqq if recipe.settled_method is Method.HQQ else quantize_rtn
        if not is_calibrated(model.graph, recipe):
            return Calibrated(model.graph, rounding=rounding)
        if text is not None:
            findings = keep(partial(_read_text, model, recipe, text, say, start, advance))
            graph = fold_scales(model.graph, findings.scales) if findings.scales else model.graph
            record = _text_record(recipe, text, findings)
            return Calibrated(graph, findings.importance, findings.codes, record, rounding, findings.scales)
        match calibration.source:
            case CalibrationSource.IMATRIX:
                return replace(_calibrate_by_matrix(model, Path(calibration.file or ""), say), rounding=rounding)
            case _:
                say(f"calibrating: the model reads {read.tokens} random tokens")
                record = {"source": calibration.source.value, "tokens": read.tokens, "seed": calibration.seed}
                importance = random_token_importance(model.graph, read.tokens, calibration.seed)
                return Calibrated(model.graph, importance, None, record, rounding)


def _read_text(
    model: Model,
    recipe: Recipe,
    text: CalibrationText,
    say: Callable[[str], None],
    start: Callable[[str, int], None],
    advance: Callable[[int], None],
    place: Workplace,
) -> Findings:
    graph, read = model.graph, reading(model, recipe)
    token_ids = place.token_ids if text.token_ids is None else text.token_ids
    if token_ids is None:
        say(f"calibrating: the model writes {read.tokens} tokens, one after the other; no plan counts their time")
        start("writing text", read.tokens)
        token_ids = calibration_ids(model, recipe.calibration, text.origin, read.sequences, read.length, advance)
        place.keep_text(token_ids)
    say(f"calibrating: the model reads {read.sequences} sequences of {read.length} tokens of {title_of(text.origin)}")
    store, scales = Store(place.folder), place.scales
    if read.scaled and scales is None:
        start("scaling columns", linear_elements(graph))
        scales = find_scales(graph, token_ids, advance, store)
        place.keep_scales(scales)
    graph = fold_scales(graph, scales) if scales else graph
    start("fitting layers" if read.fitted else "calibrating", linear_elements(graph))
    codes = CodeStore(place.folder, dict(place.bits)) if read.fitted else None
    fit = None if codes is None else partial(_fit, codes, _REFINE.get(recipe.settled_method))
    begin, reached = place.progress(store), partial(place.keep_progress, codes)
    importance = quantize_sequentially(graph, token_ids, fit, advance, store=store, begin=begin, reached=reached)
    return Findings(digest(token_ids), importance, scales or {}, codes)


def title_of(origin: Origin) -> str:
    """What the manifest calls it, which holds no paths."""
    return origin.path.name if isinstance(origin, Files) else name_of(origin)


def _text_record(recipe: Recipe, text: CalibrationText, findings: Findings) -> Record:
    calibration = recipe.calibration
    record: Record = {
        "source": calibration.source.value,
        "method": recipe.settled_method.value,
        "text": title_of(text.origin),
        "token_ids_sha256": findings.token_ids_sha256,
        "sequences": calibration.sequences,
        "length": calibration.length,
        "seed": calibration.seed,
        "chat": calibration.chat,
    }
    return {**record, "revision": text.origin.revision} if isinstance(text.origin, Dataset) else record


def origin_of(calibration: Calibration) -> Origin:
    """Where the text of a calibration by text comes from. UsageError if a dataset cannot be found."""
    match calibration.source:
        case CalibrationSource.DATASET:
            from converters.hub_dataset import find_dataset  # huggingface_hub is slow to import

            return find_dataset(calibration.dataset or "", calibration.revision, calibration.files)
        case CalibrationSource.SELF:
            return OwnText()
        case _:
            return Files(expanded(calibration.text)) if calibration.text else Documentation()


def calibration_ids(
    model: Model,
    calibration: Calibration,
    origin: Origin,
    sequences: int,
    length: int,
    advance: Callable[[int], None] = lambda tokens: None,
    say: Callable[[str], None] = lambda text: None,
) -> NDArray[np.int64]:
    """Sequences i64[sequences, length] of the calibration's text, as calibration_sequences gives them."""
    return calibration_sequences(model, origin, sequences, length, calibration.seed, calibration.chat, advance, say)


def known_importance(model: Model, recipe: Recipe) -> Mapping[str, F32]:
    """Importances before any text is read: an importance matrix's, or those of random tokens; none if uncalibrated."""
    if not recipe.calibration.is_on:
        return {}
    if recipe.calibration.source is CalibrationSource.IMATRIX:
        return _calibrate_by_matrix(model, Path(recipe.calibration.file or ""), lambda text: None).importance
    return random_token_importance(model.graph, recipe.calibration.tokens, recipe.calibration.seed)


def known_importance_key(model: Model, recipe: Recipe) -> dict[str, str | int] | None:
    """What known_importance depends on besides the checkpoint; computes nothing. None if uncalibrated."""
    calibration = recipe.calibration
    if not calibration.is_on:
        return None
    if calibration.source is CalibrationSource.IMATRIX:
        record = _calibrate_by_matrix(model, Path(calibration.file or ""), lambda text: None).record or {}
        return {"sha256": record["sha256"]}
    return {"tokens": calibration.tokens, "seed": calibration.seed}


def linear_elements(graph: Graph) -> int:
    """Numbers in the matrices that Linears use, each use counted: what reading text advances by."""
    used = [name for node in graph.nodes if isinstance(node.op, Linear) for name in node.op.weights]
    return sum(math.prod(graph.weights[name].shape) for name in used)


def _calibrate_by_matrix(model: Model, file: Path, say: Callable[[str], None]) -> Calibrated:
    """Importances from llama.cpp's importance matrix of this model."""
    from converters.quantize.imatrix import read_imatrix
    from exporters.gguf.importance import imatrix_importance

    path = expanded(file)
    matrix = read_imatrix(path)
    say(f"calibration: {file}, {len(matrix.means)} entries from {matrix.chunks} chunks of text")
    importance = imatrix_importance(matrix, model.graph, str(file))
    absent = sorted({name for node in model.graph.nodes[-1:] for name in node.op.weights} - importance.keys())
    if absent:
        say(f"calibration: no entry for {', '.join(absent)}, whose columns count the same")
    record: Record = {"source": CalibrationSource.IMATRIX.value, "file": path.name, "sha256": sha256_of([path])[path]}
    return Calibrated(model.graph, importance, None, record)


def _fit(store: CodeStore, refine: Refine | None, weight: Weight, moments: Moments) -> QuantTensor:
    """A weight's codes by GPTQ, some rows at a time, which the store then has."""
    rows, width = weight.shape
    step = max(1, FIT_ELEMENTS // width)
    parts = []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = read_rows(weight, start, stop)
        deficit = None if moments.deficit is None else moments.deficit[start:stop]
        try:
            fitted = quantize_gptq(values, moments.hessian, weight.scheme, moments.cross, deficit, refine=refine)
            parts.append(fitted)
        except (ValueError, OverflowError) as error:
            raise ModelError(
                "a layer cannot be fitted to its calibration",
                where=weight.name,
                found=str(error),
                mend="Use other text, or method: rtn; if the model computes nonsense, download it again.",
            ) from error
    tensor = _joined(parts)
    store.put(weight.name, tensor)
    return tensor


def _joined(parts: list[QuantTensor]) -> QuantTensor:
    zeros = [part.zero for part in parts if part.zero is not None]
    return QuantTensor(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate(zeros) if zeros else None,
        parts[0].bits,
    )
