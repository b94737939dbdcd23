"""The runtime of verification holds a model's weights once, whatever it is asked in turn."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest

ov = pytest.importorskip("openvino")
genai = pytest.importorskip("openvino_genai")

from exporters.openvino.exporter import EXPORTER  # noqa: E402
from exporters.options import OpenvinoOptions  # noqa: E402
from tests.exporters.openvino.artifacts import write_artifact  # noqa: E402
from tests.exporters.oracle import random_ids  # noqa: E402
from tests.exporters.tiny_checkpoints import make_model  # noqa: E402


def test_the_network_and_the_pipeline_are_never_open_together(tmp_path, monkeypatch):
    """Each packs the weights for the processor: both at once would take twice the memory."""
    model = make_model("mistral", tmp_path)
    runtime = EXPORTER.open(write_artifact(model, tmp_path), OpenvinoOptions())
    opened: list[tuple[str, weakref.ref[object]]] = []

    def watched(name: str, make: Callable[..., object]) -> Callable[..., object]:
        def open_one(*arguments: object, **settings: object) -> object:
            assert [other for other, alive in opened if alive() is not None] == []
            made = make(*arguments, **settings)
            opened.append((name, weakref.ref(made)))
            return made

        return open_one

    # A request keeps its network alive, whoever else lets go of it.
    request = watched("network", ov.CompiledModel.create_infer_request)
    monkeypatch.setattr(ov.CompiledModel, "create_infer_request", request)
    monkeypatch.setattr(genai, "LLMPipeline", watched("pipeline", genai.LLMPipeline))
    ids = random_ids(model.graph, 12)
    before = runtime.logits(ids)
    runtime.answer("Hello", 2)
    np.testing.assert_array_equal(runtime.logits(ids), before)
    runtime.as_opened(ids)
    runtime.converse([ids[:4], ids[4:8]], 2)
    assert [name for name, _ in opened] == ["network", "pipeline", "network", "network", "pipeline"]
