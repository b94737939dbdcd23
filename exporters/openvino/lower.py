"""Graph -> openvino.Model, one lowering function an op, in the patterns that OpenVINO's plugins fuse.

Read off the IR that optimum-intel exports and the matchers in OpenVINO's sources: RMS, rotary embedding, stateful
scaled dot-product attention, compressed weights, and SDPAToPagedAttention, which openvino-genai applies on load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import openvino as ov
from openvino import opset15 as ops

from converters.graph import LOGITS, TOKEN_IDS, Graph, Node
from converters.ops import Add, Attention, Embedding, Linear, Op, RmsNorm, SwiGlu
from exporters.openvino.attention import SequenceState, attend
from exporters.openvino.constants import ints, scalar
from exporters.openvino.ir import name_helpers
from exporters.openvino.storage import Matrix, Stored, plan_matrices

Constants = Callable[[Stored], ov.Output]

INPUTS: Mapping[str, tuple[tuple[int, ...], ov.Type]] = {
    "input_ids": ((-1, -1), ov.Type.i64),
    "attention_mask": ((-1, -1), ov.Type.i64),
    "position_ids": ((-1, -1), ov.Type.i64),
    "beam_idx": ((-1,), ov.Type.i32),
}


class Lowering:
    """The model under construction: values by name, matrices by weight, the state of the sequence."""

    def __init__(self, graph: Graph, constants: Constants) -> None:
        self.parameters = [_parameter(name, *INPUTS[name]) for name in INPUTS]
        input_ids, attention_mask, position_ids, beam_idx = (parameter.output(0) for parameter in self.parameters)
        self.values: dict[str, ov.Output] = {TOKEN_IDS: input_ids}
        self.sequence = SequenceState(input_ids, attention_mask, position_ids, beam_idx)
        self._constants = constants
        self._matrices = plan_matrices(graph)
        self._dequantized: dict[str, ov.Output] = {}

    def matrices(self, node: Node) -> list[ov.Output]:
        """f32 matrices (or the norm's vector) whose rows, one after another, are the node's weights."""
        wanted = set(node.op.weights)
        used = [matrix for matrix in self._matrices if not wanted.isdisjoint(matrix.weights)]
        assert tuple(name for matrix in used for name in matrix.weights) == node.op.weights
        return [self._float(matrix) for matrix in used]

    def _float(self, matrix: Matrix) -> ov.Output:
        if matrix.name not in self._dequantized:
            self._dequantized[matrix.name] = decompress(matrix, self._constants)
        return self._dequantized[matrix.name]


def build_model(graph: Graph, constants: Constants) -> ov.Model:
    """The stateful model with inputs INPUTS and output logits f32[batch, length, vocab].

    `constants` supplies the Constant of a stored part; its numbers are not looked at.
    """
    lowering = Lowering(graph, constants)
    for node in graph.nodes:
        value = LOWERINGS[type(node.op)](node, node.op, lowering)
        value.get_node().set_friendly_name(node.name)
        lowering.values[node.name] = value
    logits = lowering.values[LOGITS]
    logits.get_tensor().set_names({LOGITS})
    logits.get_node().set_friendly_name(LOGITS + "/matmul")
    result = ops.result(logits, name=LOGITS)
    model = ov.Model([result], lowering.sequence.assigns, lowering.parameters, "model")
    name_helpers(model)
    return model


def decompress(matrix: Matrix, constants: Constants) -> ov.Output:
    """The f32 view of a stored matrix. That products are fp16 is on paper only: plugins fold the scale into MatMul."""
    parts = matrix.constants()
    if "weight" in parts:
        weight = constants(parts["weight"])
        return weight if parts["weight"].type == "f32" else ops.convert(weight, "f32", name=matrix.name).output(0)
    value = ops.convert(constants(parts["codes"]), "f16")
    if "zero" in parts:
        value = ops.subtract(value, ops.convert(constants(parts["zero"]), "f16"))
    value = ops.multiply(value, constants(parts["scale"]))
    if matrix.groups > 1:
        value = ops.reshape(value, ints(*matrix.shape), special_zero=False)
    return ops.convert(value, "f32", name=matrix.name).output(0)


def _embedding(node: Node, op: Op, to: Lowering) -> ov.Output:
    (table,) = to.matrices(node)
    ids = ops.convert(to.values[node.inputs[0]], "i32")
    return ops.gather(table, ids, scalar(0, np.int32)).output(0)


def _rms_norm(node: Node, op: Op, to: Lowering) -> ov.Output:
    assert isinstance(op, RmsNorm)
    (weight,) = to.matrices(node)
    x = to.values[node.inputs[0]]
    mean = ops.reduce_mean(ops.power(x, scalar(2.0)), ints(-1), keep_dims=True)
    root = ops.sqrt(ops.add(mean, scalar(op.epsilon)))
    return ops.multiply(ops.multiply(x, ops.divide(scalar(1.0), root)), weight).output(0)


def _linear(node: Node, op: Op, to: Lowering) -> ov.Output:
    x = to.values[node.inputs[0]]
    parts = [ops.matmul(x, matrix, False, True).output(0) for matrix in to.matrices(node)]
    return parts[0] if len(parts) == 1 else ops.concat(parts, -1).output(0)


def _attention(node: Node, op: Op, to: Lowering) -> ov.Output:
    assert isinstance(op, Attention)
    return attend(op, to.values[node.inputs[0]], to.sequence)


def _swiglu(node: Node, op: Op, to: Lowering) -> ov.Output:
    x = to.values[node.inputs[0]]
    half = x.get_partial_shape()[2].get_length() // 2
    gate, up = ops.variadic_split(x, scalar(-1, np.int64), ints(half, half)).outputs()
    return ops.multiply(ops.swish(gate), up).output(0)


def _add(node: Node, op: Op, to: Lowering) -> ov.Output:
    left, right = (to.values[name] for name in node.inputs)
    return ops.add(left, right).output(0)


LOWERINGS: Mapping[type[Op], Callable[[Node, Op, Lowering], ov.Output]] = {
    Embedding: _embedding,
    RmsNorm: _rms_norm,
    Linear: _linear,
    Attention: _attention,
    SwiGlu: _swiglu,
    Add: _add,
}


def _parameter(name: str, shape: tuple[int, ...], kind: ov.Type) -> ov.op.Parameter:
    parameter = ops.parameter(list(shape), kind, name=name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter
