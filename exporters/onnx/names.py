"""Names by which the outside knows an artifact: files, and the inputs and outputs onnxruntime-genai uses by default."""

from __future__ import annotations

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
PAST_KEY, PAST_VALUE = "past_key_values.%d.key", "past_key_values.%d.value"
PRESENT_KEY, PRESENT_VALUE = "present.%d.key", "present.%d.value"
