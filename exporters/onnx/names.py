"""Names by which the outside knows an artifact: files, and the inputs and outputs onnxruntime-genai uses by default."""

from __future__ import annotations

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
PAST, PRESENT = "past_key_values.", "present."
PAST_KEY, PAST_VALUE = PAST + "%d.key", PAST + "%d.value"
PRESENT_KEY, PRESENT_VALUE = PRESENT + "%d.key", PRESENT + "%d.value"
