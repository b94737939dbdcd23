"""openvino-genai keeps keys across chunks, requests and turns: LongRoPE's factors must be those of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino")
genai = pytest.importorskip("openvino_genai")

from converters.passes.context import for_context  # noqa: E402
from converters.tokenizer import read_tokenizer  # noqa: E402
from exporters.base import Model  # noqa: E402
from exporters.openvino.runtime import EXACT  # noqa: E402
from tests.converters.tiny_tokenizers import write_byte_level  # noqa: E402
from tests.exporters.openvino.artifacts import write_artifact  # noqa: E402
from tests.exporters.oracle import random_ids, reference_logits  # noqa: E402
from tests.exporters.tiny_graphs import BASE, longrope, random_graph  # noqa: E402

ORIGINAL = 64  # two blocks of the paged cache
CHUNK = 256  # tokens that a default scheduler reads at a time
ANSWER = 6


@pytest.fixture(scope="module", params=[ORIGINAL, 1024], ids=["short factors", "long factors"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    folder = tmp_path_factory.mktemp("longrope")
    graph = for_context(random_graph(replace(BASE, rope=longrope(ORIGINAL, 12), num_kv_heads=2)), request.param)
    tokenizer = read_tokenizer(folder, write_byte_level(folder, None))
    model = Model(graph, tokenizer, request.param, "Tiny")
    return model, write_artifact(model, folder)


def settings() -> Any:
    return genai.GenerationConfig(max_new_tokens=ANSWER, do_sample=False, ignore_eos=True)


def assert_likeliest(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Each token of the answer is the interpreter's choice after those before it."""
    assert len(answer) == ANSWER
    logits = reference_logits(model.graph, [*prompt, *answer])
    assert list(answer) == logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()


def test_requests_of_all_lengths_at_once(artifact: tuple[Model, Path]) -> None:
    """A short one, one whose answer crosses the original context, and one that is read in chunks."""
    model, folder = artifact
    pipeline = genai.ContinuousBatchingPipeline(folder, genai.SchedulerConfig(), "CPU", dict(EXACT))
    prompts = [random_ids(model.graph, length) for length in (20, ORIGINAL - 2, CHUNK + 40)]
    results = pipeline.generate([ov.Tensor(np.array([ids], np.int64)) for ids in prompts], [settings()] * len(prompts))
    for prompt, result in zip(prompts, results, strict=True):
        assert_likeliest(model, prompt, result.m_generation_ids[0])


def test_turns_of_a_default_pipeline(artifact: tuple[Model, Path]) -> None:
    """The second turn takes the first one's keys from the prefix cache, and passes the original context."""
    model, folder = artifact
    pipeline = genai.LLMPipeline(folder, "CPU", **EXACT)
    said = random_ids(model.graph, ORIGINAL - 10)
    for turn in (0, 30):
        said += random_ids(model.graph, turn)
        ids = np.array([said], np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        (answer,) = pipeline.generate(inputs, settings()).tokens
        assert_likeliest(model, said, answer)
        said += answer
    assert len(said) > ORIGINAL + ANSWER
