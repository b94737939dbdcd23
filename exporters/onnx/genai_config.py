"""genai_config.json: what onnxruntime-genai needs to know beside the graph.

Keys: https://onnxruntime.ai/docs/genai/reference/config.html and src/config.h of microsoft/onnxruntime-genai.
"""

from __future__ import annotations

import json

from converters.graph import LOGITS
from exporters.base import Model
from exporters.onnx.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    MODEL_FILE,
    PAST_KEY,
    PAST_VALUE,
    POSITION_IDS,
    PRESENT_KEY,
    PRESENT_VALUE,
)
from exporters.onnx.settings import Settings
from exporters.options import ExecutionProvider

Json = str | int | float | bool | list["Json"] | dict[str, "Json"]

# To onnxruntime-genai all decoder types are alike, but for those of graphs that choose LongRoPE's factors by the length
# so far: at 4097 tokens it reads all of a "phi3" anew (Generator::InitializePhi3RopeThreshold).
MODEL_TYPE = "llama"

PROVIDER_OPTIONS: dict[ExecutionProvider, list[Json]] = {
    ExecutionProvider.CPU: [],
    ExecutionProvider.CUDA: [{"cuda": {"enable_cuda_graph": "0"}}],
    ExecutionProvider.DML: [{"dml": {"enable_graph_capture": "1"}}],
    ExecutionProvider.WEBGPU: [{"webgpu": {"enableGraphCapture": "0"}}],
}


def genai_config(model: Model, settings: Settings) -> bytes:
    """The file's content."""
    tokenizer = model.tokenizer
    decoder = _decoder(model, settings)
    entry: dict[str, Json] = {
        "type": MODEL_TYPE,
        "context_length": model.context_length,
        "vocab_size": model.graph.config.vocab_size,
        "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.eos_ids[0] if tokenizer.pad_id is None else tokenizer.pad_id,
        "decoder": decoder,
    }
    if tokenizer.bos_id is not None:
        entry["bos_token_id"] = tokenizer.bos_id
    document: dict[str, Json] = {"model": entry, "search": _search(model)}
    return (json.dumps(document, indent=2) + "\n").encode()


def _decoder(model: Model, settings: Settings) -> Json:
    config = model.graph.config
    inputs: dict[str, Json] = {
        "input_ids": INPUT_IDS,
        "attention_mask": ATTENTION_MASK,
        "past_key_names": PAST_KEY,
        "past_value_names": PAST_VALUE,
    }
    if not settings.fused_attention:
        inputs["position_ids"] = POSITION_IDS
    return {
        "filename": MODEL_FILE,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": PROVIDER_OPTIONS[settings.provider]},
        "hidden_size": config.hidden_size,
        "head_size": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_hidden_layers": config.num_layers,
        "inputs": inputs,
        "outputs": {"logits": LOGITS, "present_key_names": PRESENT_KEY, "present_value_names": PRESENT_VALUE},
    }


def _search(model: Model) -> Json:
    """Defaults for generation; a program may override each. The publisher's sampling wins over greedy decoding."""
    search: dict[str, Json] = {
        "do_sample": False,
        "max_length": model.context_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    return search | dict(model.sampling)
