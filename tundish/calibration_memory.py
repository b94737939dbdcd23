"""What a model that reads text holds in memory at most, and what it writes to the disk meanwhile: bytes, foreseen."""

from __future__ import annotations

import math

from converters.graph import LOGITS, TOKEN_IDS, Graph, infer_shapes
from converters.ops import MAX_SCORES, MAX_WEIGHTS, Linear
from converters.quantize.refinement import REFINED_ARRAYS, REFINED_ELEMENTS
from converters.quantize.sensitivity import stacks
from converters.quantize.sequential import fittable
from converters.quantize.stream import COMPUTED, MULTIPLIED, ROOM
from tundish.calibrate import FIT_ELEMENTS, SENSITIVITY_TOKENS, Reading
from tundish.recipe import Recipe, Sensitivity

TOKENIZER_ENTRY = 1280  # bytes of the tokenizers library for an entry of the vocabulary
_LIVE_ACTIVATIONS = 4
_FIT_MATRICES, _FIT_HESSIANS = 6, 5  # float32 arrays of a matrix's shape and of its Hessian's while it is fitted
_ESTIMATE_ROWS = 7  # float32 arrays of the numbers of a gradient that are held at once
_LIVE_GRADIENTS = 3
_LIVE_LOGITS = 6  # float32 arrays while two models' answers are compared


def interpreter_bytes(graph: Graph, sequences: int, length: int) -> int:
    """What the interpreter holds at most: rows of a weight in float32 beside a copy as stored, a node's input and
    output, the residual, a few temporaries of an activation, and attention scores with one of theirs."""
    weights = min(MAX_WEIGHTS, max(math.prod(weight.shape) for weight in graph.weights.values()))
    features = max(shape[-1] for name, shape in infer_shapes(graph, 1, 1).items() if name not in (TOKEN_IDS, LOGITS))
    shared = graph.config.num_heads // graph.config.num_kv_heads
    scores = min(MAX_SCORES, shared * length * length)
    return weights * 6 + sequences * length * features * 4 * _LIVE_ACTIVATIONS + scores * 8


def calibration_bytes(graph: Graph, read: Reading) -> int:
    """What the model holds while it reads: everything of a sequence, or the values of all of them that still matter,
    as far as there is room for them, and beside these what computes a node or what a matrix is fitted with."""
    alone = interpreter_bytes(graph, 1, read.length)
    if not read.together:
        return alone
    tokenizer = graph.config.vocab_size * TOKENIZER_ENTRY
    computed = alone + 2 * 4 * min(COMPUTED, read.tokens * _widest(graph))
    return (
        tokenizer + min(_values(graph, read), ROOM) + max(computed, _moment_bytes(graph, read), _fit_bytes(graph, read))
    )


def scratch_bytes(graph: Graph, read: Reading) -> int:
    """What lies on the disk until the calibration is done: values that have no room, and those behind a block, by which
    it goes on if it is killed, while they are replaced by the next."""
    if not read.together:
        return 0
    nbytes = _values(graph, read)
    behind = 4 * read.tokens * graph.config.hidden_size * (2 if read.fitted else 1)
    return (nbytes if nbytes > ROOM else 0) + 2 * behind


def budget_bytes(graph: Graph, recipe: Recipe) -> int:
    """What finding the costs of a budget's schemes holds."""
    sequences, length = SENSITIVITY_TOKENS
    tokens = sequences * length
    shapes = infer_shapes(graph, 1, 1)
    logits = 4 * tokens * graph.config.vocab_size
    importance = interpreter_bytes(graph, 1, recipe.calibration.tokens) if recipe.calibration.is_on else 0
    if recipe.budget is not None and recipe.budget.sensitivity is Sensitivity.MEASURED:
        walk = ROOM + 2 * 4 * COMPUTED + interpreter_bytes(graph, 1, length)
        values = 4 * tokens * graph.config.hidden_size * len(stacks(graph))
        return max(importance, walk, min(values, ROOM) + _LIVE_LOGITS * logits)
    borders = 4 * tokens * graph.config.hidden_size * (graph.config.num_layers + 2)
    block = 4 * tokens * sum(shapes[node.name][-1] for node in graph.nodes if node.layer == 0)
    rows = 4 * min(MAX_WEIGHTS, max(math.prod(weight.shape) for weight in graph.weights.values())) * _ESTIMATE_ROWS
    gradients = max(2 * logits, block + _LIVE_GRADIENTS * 4 * tokens * _widest(graph))
    return max(importance, borders + rows + gradients)


def _values(graph: Graph, read: Reading) -> int:
    """Of all tokens, in the model that is quantized and, where layers are fitted, the float one."""
    return (2 if read.fitted else 1) * 4 * read.tokens * _widest_moment(graph)


def _moment_bytes(graph: Graph, read: Reading) -> int:
    """Of a Linear's inputs in one piece and their second moments; the float model's too where layers are fitted."""
    if not (read.fitted or read.scaled):
        return 0
    found = 0
    for node in graph.nodes:
        if isinstance(node.op, Linear):
            width = graph.weights[node.op.weights[0]].shape[1]
            inputs, several = min(read.tokens * width, MULTIPLIED), read.tokens * width > MULTIPLIED
            found = max(found, 4 * (1 + read.fitted) * (inputs + width**2) + 4 * several * width**2)
    return found


def _fit_bytes(graph: Graph, read: Reading) -> int:
    """While columns are scaled: a Linear's matrices, and again as one; their Hessian. While a matrix is fitted: some of
    its rows in several forms, what they are fitted to, and its codes."""
    found = 0
    if read.scaled:
        for node in graph.nodes[:-1]:
            if isinstance(node.op, Linear):
                shapes = [graph.weights[name].shape for name in node.op.weights]
                rows, width = sum(rows for rows, _ in shapes), shapes[0][1]
                found = max(found, 4 * (2 * rows * width + 3 * width**2))
    if read.fitted:
        for rows, width in (weight.shape for weight in fittable(graph)):
            together = min(rows * width, max(FIT_ELEMENTS, width))
            found = max(found, 4 * (_FIT_MATRICES * together + _FIT_HESSIANS * width**2) + rows * width)
    return found + (4 * REFINED_ARRAYS * REFINED_ELEMENTS if read.steps else 0)


def _widest(graph: Graph) -> int:
    """Features of the value that has the most, logits aside."""
    return max(shape[-1] for name, shape in infer_shapes(graph, 1, 1).items() if name not in (TOKEN_IDS, LOGITS))


def _widest_moment(graph: Graph) -> int:
    """Most features of a token that are held at once, while a node is computed from those that still matter."""
    shapes = infer_shapes(graph, 1, 1)
    last_use = graph.last_uses()
    live: set[str] = set()
    widest = 0
    for index, node in enumerate(graph.nodes[:-1]):
        live.add(node.name)
        widest = max(widest, sum(shapes[name][-1] for name in live))
        live -= {name for name in node.inputs if last_use[name] == index}
    return widest
