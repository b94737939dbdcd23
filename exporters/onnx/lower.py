"""Lowering: the Graph to an ONNX model for ONNX Runtime, one function an op.

    Embedding  Gather, or GatherBlockQuantized on codes
    RmsNorm    its formula
    Add        with the RmsNorm behind it: SkipSimplifiedLayerNormalization, which returns norm and sum; else Add
    Linear     MatMulNBits, or FusedMatMul with the weight as it lies in the checkpoint, [out, in]
    Attention  GroupQueryAttention with rotation inside; DirectML: RotaryEmbedding for q and k before it
    SwiGlu     Sigmoid and two Mul

Operators outside ONNX's own set: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

A value of the Graph is one ONNX value or several, its parts along the feature axis: a Linear whose weights differ in
scheme gives a part for each weight, and Attention and SwiGlu take parts as they come, so nothing is concatenated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from converters.graph import LOGITS, TOKEN_IDS, Graph, Node
from converters.ops import Add, Attention, Embedding, Linear, Op, RmsNorm, SwiGlu
from exporters.onnx.data_file import ONNX_TYPES, DataFile
from exporters.onnx.lowering import MICROSOFT, SEQLENS, TOTAL_LENGTH, Lowering
from exporters.onnx.matrices import Matrices, Matrix
from exporters.onnx.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    PAST_KEY,
    PAST_VALUE,
    POSITION_IDS,
    PRESENT_KEY,
    PRESENT_VALUE,
)
from exporters.onnx.rotary import lower_caches, rotate_query_and_key
from exporters.onnx.settings import Settings, float_type
from exporters.options import ExecutionProvider

OPSET = 21
IR_VERSION = 10  # of opset 21
NARROW_LOGITS = "logits.narrow"


def lower(graph: Graph, settings: Settings) -> tuple[onnx.ModelProto, Matrices]:
    """The model, its weights in external data, and where each weight goes."""
    data = DataFile()
    lowering = Lowering(graph, settings, data, Matrices(graph.weights, settings, data))
    lowering.fused_adds = _adds_before_norms(graph)
    lowering.parts[TOKEN_IDS] = (INPUT_IDS,)
    _lower_mask(lowering)
    lowering.rotary = lower_caches(lowering, _attention(graph))
    for node in graph.nodes:
        LOWERINGS[type(node.op)](lowering, node)
    if settings.logits is not settings.activations:
        lowering.emit("Cast", (NARROW_LOGITS,), LOGITS, to=ONNX_TYPES[settings.logits])
    return _model(lowering), lowering.matrices


def _attention(graph: Graph) -> Attention:
    """The first layer's attention: the layers of a model differ in nothing that the graph's inputs depend on."""
    return next(node.op for node in graph.nodes if isinstance(node.op, Attention))


def _adds_before_norms(graph: Graph) -> dict[str, str]:
    """RmsNorm node -> the Add it is fused with: each Add that an RmsNorm reads."""
    adds = {node.name for node in graph.nodes if isinstance(node.op, Add)}
    readers = (node for node in graph.nodes if isinstance(node.op, RmsNorm))
    return {node.name: node.inputs[0] for node in readers if node.inputs[0] in adds}


def _lower_mask(lowering: Lowering) -> None:
    """What GroupQueryAttention wants: seqlens_k i32[batch], each sequence's tokens - 1, and the longest total, i32."""
    axis = lowering.constant("mask.axis", [1])
    tokens = lowering.emit("ReduceSum", (ATTENTION_MASK, axis), "mask.tokens", keepdims=0)
    last = lowering.emit("Sub", (tokens, axis), "mask.last")
    lowering.emit("Cast", (last,), SEQLENS, to=TensorProto.INT32)
    shape = lowering.emit("Shape", (ATTENTION_MASK,), "mask.shape")
    length = lowering.emit("Gather", (shape, lowering.constant("mask.dimension", 1)), "mask.length", axis=0)
    lowering.emit("Cast", (length,), TOTAL_LENGTH, to=TensorProto.INT32)


def _lower_embedding(lowering: Lowering, node: Node) -> None:
    matrix = lowering.matrices.matrix(node.op.weights)
    ids = lowering.value(node.inputs[0])
    lowering.parts[node.name] = (node.name,)
    if matrix.scheme.is_integer:
        gather = _gather_decoded if lowering.settings.provider is ExecutionProvider.DML else _gather_block_quantized
        gather(lowering, matrix, ids, node.name)
    elif float_type(matrix.scheme) is lowering.settings.activations:
        lowering.emit("Gather", (lowering.matrices.floats(matrix), ids), node.name)
    else:
        rows = lowering.emit("Gather", (lowering.matrices.floats(matrix), ids), f"{node.name}.rows")
        lowering.cast(rows, node.name)


def _gather_block_quantized(lowering: Lowering, matrix: Matrix, ids: str, output: str) -> None:
    codes, quantization = lowering.matrices.flat_codes(matrix), lowering.matrices.quantization(matrix)
    lowering.emit(
        "GatherBlockQuantized",
        (codes, ids, *quantization),
        output,
        MICROSOFT,
        bits=matrix.scheme.bits,
        block_size=matrix.block,
        gather_axis=0,
        quantize_axis=1,
    )


def _gather_decoded(lowering: Lowering, matrix: Matrix, ids: str, output: str) -> None:
    """Rows gathered as bytes and decoded with ordinary operators: DirectML has no GatherBlockQuantized."""
    scales, *zeros = lowering.matrices.quantization(matrix)
    rows = lowering.emit("Gather", (lowering.matrices.flat_codes(matrix), ids), f"{output}.bytes")
    codes = _decode(lowering, matrix.scheme.bits, rows, matrix.width, f"{output}.codes")
    scale = lowering.emit("Gather", (scales, ids), f"{output}.scale")
    axis = lowering.constant("last_axis", [-1])
    groups = matrix.width // matrix.block
    if zeros:
        packed = lowering.emit("Gather", (zeros[0], ids), f"{output}.zero_bytes")
        flat = _decode(lowering, matrix.scheme.bits, packed, groups, f"{output}.zeros")
        zero = lowering.emit("Unsqueeze", (flat, axis), f"{output}.zero")
    else:
        number = np.array(1 << (matrix.scheme.bits - 1), lowering.settings.numpy_type)
        zero = lowering.constant(f"{output}.zero", number, number.dtype.type)
    blocks = lowering.constant("embedding.blocks", [0, 0, groups, matrix.block])
    by_block = lowering.emit("Reshape", (codes, blocks), f"{output}.by_block")
    signed = lowering.emit("Sub", (by_block, zero), f"{output}.signed")
    scale = lowering.emit("Unsqueeze", (scale, axis), f"{output}.block_scale")
    scaled = lowering.emit("Mul", (signed, scale), f"{output}.scaled")
    features = lowering.constant("embedding.features", [0, 0, matrix.width])
    lowering.emit("Reshape", (scaled, features), output)


def _decode(lowering: Lowering, bits: int, packed: str, count: int, output: str) -> str:
    """u8[batch, length, bytes] -> [batch, length, count] numbers in the activations' type, exact up to 255."""
    numbers = lowering.cast(packed, f"{output}.numbers")
    if bits == 8:
        return numbers
    dtype = lowering.settings.numpy_type.type
    sixteen = lowering.constant("sixteen", 16, dtype)
    axis = lowering.constant("last_axis", [-1])
    high = lowering.emit("Floor", (lowering.emit("Div", (numbers, sixteen), f"{output}.quotient"),), f"{output}.high")
    low = lowering.emit("Sub", (numbers, lowering.emit("Mul", (high, sixteen), f"{output}.tens")), f"{output}.low")
    halves = tuple(lowering.emit("Unsqueeze", (half, axis), f"{half}.column") for half in (low, high))
    pairs = lowering.emit("Concat", halves, f"{output}.pairs", axis=-1)
    shape = lowering.constant("merge_pairs", [0, 0, -1])
    merged = lowering.emit("Reshape", (pairs, shape), f"{output}.merged")
    if count % 2 == 0:
        return merged
    start, stop = lowering.constant("zero", [0]), lowering.constant(f"{output}.count", [count])
    return lowering.emit("Slice", (merged, start, stop, axis), output)


def _lower_norm(lowering: Lowering, node: Node) -> None:
    assert isinstance(node.op, RmsNorm)
    weight = lowering.matrices.vector(node.op.weights[0])
    lowering.parts[node.name] = (node.name,)
    add = lowering.fused_adds.get(node.name)
    if add is None:
        _rms_norm(lowering, lowering.value(node.inputs[0]), weight, node.op.epsilon, node.name)
        return
    residual, update = (lowering.value(name) for name in next(n for n in lowering.graph.nodes if n.name == add).inputs)
    used_elsewhere = sum(add in other.inputs for other in lowering.graph.nodes) > 1
    outputs = (node.name, "", "", add) if used_elsewhere else (node.name,)
    lowering.emit(
        "SkipSimplifiedLayerNormalization", (residual, update, weight), outputs, MICROSOFT, epsilon=node.op.epsilon
    )


def _rms_norm(lowering: Lowering, x: str, weight: str, epsilon: float, output: str) -> None:
    """x / sqrt(mean(x^2) + epsilon) * weight in ONNX's own operators, the quotient in float32.

    ONNX Runtime fuses these into its SimplifiedLayerNormalization, which onnx.checker does not know. It occurs once,
    before the first layer.
    """
    wide = lowering.emit("Cast", (x,), f"{output}.wide", to=TensorProto.FLOAT)
    square = lowering.emit("Pow", (wide, lowering.constant("two", 2, np.float32)), f"{output}.square")
    mean = lowering.emit("ReduceMean", (square, lowering.constant("last_axis", [-1])), f"{output}.mean", keepdims=1)
    shifted = lowering.emit("Add", (mean, lowering.constant("epsilon", epsilon, np.float32)), f"{output}.shifted")
    root = lowering.emit("Sqrt", (shifted,), f"{output}.root")
    quotient = lowering.emit("Div", (wide, root), f"{output}.quotient")
    lowering.emit("Mul", (lowering.cast(quotient, f"{output}.normed"), weight), output)


def _lower_add(lowering: Lowering, node: Node) -> None:
    lowering.parts[node.name] = (node.name,)
    if node.name not in lowering.fused_adds.values():
        lowering.emit("Add", tuple(lowering.value(name) for name in node.inputs), node.name)


def _lower_linear(lowering: Lowering, node: Node) -> None:
    schemes = {lowering.graph.weights[name].scheme for name in node.op.weights}
    x = lowering.value(node.inputs[0])
    output = node.name
    if output == LOGITS and lowering.settings.logits is not lowering.settings.activations:
        output = NARROW_LOGITS
    if len(node.op.weights) == 1 or (len(schemes) == 1 and lowering.settings.fused_attention):
        stacks = {output: node.op.weights}
    else:
        stacks = {f"{output}.{index}": (name,) for index, name in enumerate(node.op.weights)}
    for part, names in stacks.items():
        _matmul(lowering, lowering.matrices.matrix(names), x, part)
    lowering.parts[node.name] = tuple(stacks)


def _matmul(lowering: Lowering, matrix: Matrix, x: str, output: str) -> None:
    """x @ matrix.T"""
    settings, matrices = lowering.settings, lowering.matrices
    if matrix.scheme.is_integer:
        attributes = {"K": matrix.width, "N": matrix.rows, "bits": matrix.scheme.bits, "block_size": matrix.block}
        if settings.accuracy_level is not None:
            attributes["accuracy_level"] = settings.accuracy_level
        inputs = x, matrices.codes(matrix), *matrices.quantization(matrix)
        lowering.emit("MatMulNBits", inputs, output, MICROSOFT, **attributes)
        return
    weight = matrices.floats(matrix)
    if float_type(matrix.scheme) is not settings.activations:
        weight = lowering.cast(weight, f"{output}.weight")
    if settings.provider is ExecutionProvider.WEBGPU:  # has no FusedMatMul; ONNX Runtime folds the transposition
        weight = lowering.emit("Transpose", (weight,), f"{output}.transposed", perm=[1, 0])
        lowering.emit("MatMul", (x, weight), output)
        return
    lowering.emit("FusedMatMul", (x, weight), output, MICROSOFT, transB=1)


def _lower_attention(lowering: Lowering, node: Node) -> None:
    op = node.op
    assert isinstance(op, Attention)
    query = lowering.parts[node.inputs[0]]
    caches = ("", "")
    if lowering.rotary is not None:
        if lowering.settings.fused_attention:
            caches = lowering.rotary.cos, lowering.rotary.sin
        else:
            query = rotate_query_and_key(lowering, op, query, node.name)
    past = PAST_KEY % op.layer, PAST_VALUE % op.layer
    inputs = (*query, *("",) * (3 - len(query)), *past, SEQLENS, TOTAL_LENGTH, *caches)
    attributes = {"num_heads": op.num_heads, "kv_num_heads": op.num_kv_heads, "do_rotary": int(caches != ("", ""))}
    if op.window is not None and op.window < lowering.settings.context_length:
        attributes["local_window_size"] = op.window
    while not inputs[-1]:
        inputs = inputs[:-1]
    lowering.emit(
        "GroupQueryAttention",
        inputs,
        (node.name, PRESENT_KEY % op.layer, PRESENT_VALUE % op.layer),
        MICROSOFT,
        scale=op.head_dim**-0.5,
        **attributes,
    )
    lowering.parts[node.name] = (node.name,)


def _lower_swiglu(lowering: Lowering, node: Node) -> None:
    parts = lowering.parts[node.inputs[0]]
    if len(parts) == 1:
        parts = f"{node.name}.gate", f"{node.name}.up"
        lowering.emit("Split", lowering.parts[node.inputs[0]], parts, axis=-1, num_outputs=2)
    gate, up = parts
    sigmoid = lowering.emit("Sigmoid", (gate,), f"{node.name}.sigmoid")
    silu = lowering.emit("Mul", (gate, sigmoid), f"{node.name}.silu")
    lowering.emit("Mul", (silu, up), node.name)
    lowering.parts[node.name] = (node.name,)


LOWERINGS: dict[type[Op], Callable[[Lowering, Node], None]] = {
    Embedding: _lower_embedding,
    RmsNorm: _lower_norm,
    Add: _lower_add,
    Linear: _lower_linear,
    Attention: _lower_attention,
    SwiGlu: _lower_swiglu,
}


def _model(lowering: Lowering) -> onnx.ModelProto:
    config, settings = lowering.graph.config, lowering.settings
    ids: list[str | int | None] = ["batch_size", "sequence_length"]
    inputs = [
        helper.make_tensor_value_info(INPUT_IDS, TensorProto.INT64, ids),
        helper.make_tensor_value_info(ATTENTION_MASK, TensorProto.INT64, ["batch_size", "total_sequence_length"]),
    ]
    if not settings.fused_attention:
        inputs.append(helper.make_tensor_value_info(POSITION_IDS, TensorProto.INT64, ids))
    logits = helper.make_tensor_value_info(LOGITS, ONNX_TYPES[settings.logits], [*ids, config.vocab_size])
    outputs = [logits]
    for layer in range(config.num_layers):
        inputs += [_cache(name % layer, "past_sequence_length", lowering) for name in (PAST_KEY, PAST_VALUE)]
        outputs += [_cache(name % layer, "total_sequence_length", lowering) for name in (PRESENT_KEY, PRESENT_VALUE)]
    initializers = [*lowering.constants.values(), *lowering.matrices.initializers.values()]
    graph = helper.make_graph(lowering.nodes, "model", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tundish")


def _cache(name: str, length: str, lowering: Lowering) -> onnx.ValueInfoProto:
    """An input or output of the key-value cache: [batch, kv heads, length, head size]."""
    config = lowering.graph.config
    shape: list[str | int | None] = ["batch_size", config.num_kv_heads, length, config.head_dim]
    return helper.make_tensor_value_info(name, ONNX_TYPES[lowering.settings.activations], shape)
