"""The complete folder in its runtimes, and what is refused before anything is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

genai = pytest.importorskip("openvino_genai")

from converters.chat import render_chat  # noqa: E402
from converters.errors import UsageError  # noqa: E402
from converters.role import Role  # noqa: E402
from exporters.openvino.exporter import EXPORTER  # noqa: E402
from exporters.options import OpenvinoDevice, OpenvinoOptions  # noqa: E402
from tests.converters.tiny_models import ORIGINAL_CONTEXT, VARIANTS  # noqa: E402
from tests.exporters.openvino.artifacts import write_artifact  # noqa: E402
from tests.exporters.oracle import reference_logits  # noqa: E402
from tests.exporters.tiny_checkpoints import make_model  # noqa: E402

NPU = OpenvinoOptions(devices=(OpenvinoDevice.CPU, OpenvinoDevice.NPU))
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("scheme", "accepted"),
    [("int4_g32", True), ("int8_channel", True), ("fp16", True), ("int4_asym_g32", False), ("int8_g32", False)],
)
def test_the_npu_wants_symmetric_weights(scheme, accepted, tmp_path):
    # Rows of 64 and 96: 128 divides none of them, so that 4-bit groups of 32 are as large as they can be.
    model = make_model("phi4", tmp_path, scheme)
    if accepted:
        EXPORTER.check(model, NPU)
    else:
        with pytest.raises(UsageError, match=rf"NPU.*{scheme}"):
            EXPORTER.check(model, NPU)


def test_bf16_is_for_the_cpu_alone(tmp_path):
    model = make_model("phi4", tmp_path, "int4_g32", {Role.LM_HEAD: "bf16"})
    EXPORTER.check(model, OpenvinoOptions())
    with pytest.raises(UsageError, match=r"GPU.*lm_head"):
        EXPORTER.check(model, OpenvinoOptions(devices=(OpenvinoDevice.GPU,)))


def test_the_folder_is_complete_and_states_every_stop_token(tmp_path):
    model = make_model("phi4_mini", tmp_path, "int4_g32")
    config = replace(model.graph.config, eos_token_ids=(5, 7))
    tokenizer = replace(model.tokenizer, chat_template=TEMPLATE)
    model = replace(model, graph=replace(model.graph, config=config), tokenizer=tokenizer)
    folder = write_artifact(model, tmp_path)
    assert {path.name for path in folder.iterdir()} >= {
        "openvino_model.xml",
        "openvino_model.bin",
        "openvino_tokenizer.xml",
        "openvino_detokenizer.xml",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.5
    settings = genai.LLMPipeline(folder, "CPU").get_generation_config()
    assert settings.stop_token_ids == {5, 7}
    messages = [{"role": "user", "content": "Hi"}]
    rendered = genai.Tokenizer(folder).apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == render_chat(model.tokenizer, messages)


def test_an_answer_stops_at_a_stop_token(tmp_path):
    """The stop token is chosen to be the third that the model would say."""
    model = make_model("llama3", tmp_path)
    prompt = "A"
    plain = EXPORTER.open(write_artifact(model, tmp_path / "plain"), OpenvinoOptions())
    ids = plain.tokenize(prompt)
    assert max(ids) < model.graph.config.vocab_size
    said: list[int] = []
    while len(said) < 4:
        said.append(int(reference_logits(model.graph, ids + said)[-1].argmax()))
    stop = next(token for at, token in enumerate(said) if at and token not in said[:at])
    changed = replace(model.graph, config=replace(model.graph.config, eos_token_ids=(stop,)))
    stopping = EXPORTER.open(write_artifact(replace(model, graph=changed), tmp_path / "stop"), OpenvinoOptions())
    answer = stopping.answer(prompt, 10)
    assert answer.stopped
    assert list(answer.token_ids) == said[: said.index(stop) + 1]
    cut = stopping.answer(prompt, said.index(stop))
    assert not cut.stopped
    assert list(cut.token_ids) == said[: said.index(stop)]


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_transformers_reads_config_json_as_the_same_model(name, tmp_path):
    from transformers import AutoConfig

    from converters.config import read_config
    from exporters.openvino.config import config_json

    model = make_model(name, tmp_path)
    (tmp_path / "config.json").write_bytes(config_json(model))
    assert AutoConfig.from_pretrained(tmp_path).model_type == model.graph.config.family
    again = read_config(tmp_path)
    original = model.graph.config.rope.original_context
    rope = replace(again.rope, original_context=original).for_context(model.context_length)
    assert replace(again, rope=rope) == model.graph.config


@pytest.mark.parametrize(("context", "words"), [(ORIGINAL_CONTEXT, "short factors apply"), (128, "long factors apply")])
def test_semantics_say_which_factors_apply(context, words, tmp_path):
    model = make_model("phi3_mini_128k", tmp_path, context=context)
    semantics = EXPORTER.semantics(model, OpenvinoOptions())
    assert words in semantics.sentence
    assert semantics.exact_to == context
