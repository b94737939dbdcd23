"""The recipe's context decides LongRoPE's factors; transformers, which goes by a text's length, judges each choice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from converters.source import Source  # noqa: E402
from exporters.base import Target  # noqa: E402
from exporters.registry import EXPORTERS  # noqa: E402
from tests.converters.tiny_models import reference_logits  # noqa: E402
from tests.exporters.oracle import divergences  # noqa: E402
from tests.tundish.tiny import ORIGINAL_CONTEXT, write_recipe  # noqa: E402
from tundish.model import open_model  # noqa: E402
from tundish.pour import pour  # noqa: E402
from tundish.recipe import load_recipe  # noqa: E402
from tundish.verify import missing_runtime  # noqa: E402

SHORT, LONG = 40, ORIGINAL_CONTEXT + 20


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize(("context", "length"), [(ORIGINAL_CONTEXT, ORIGINAL_CONTEXT), ("full", LONG)])
def test_every_runtime_computes_what_transformers_does(
    context: int | str, length: int, target: Target, checkpoint: Path, tmp_path: Path
) -> None:
    exporter = EXPORTERS[target]
    if missing_runtime(exporter):
        pytest.skip(f"no runtime for {target}")
    recipe = load_recipe(write_recipe(tmp_path / "mine.yaml", checkpoint, context=context))
    model = open_model(Source(str(checkpoint), checkpoint, None, None), recipe)
    options = recipe.targets[target]
    pour(model.graph, {target: exporter.layout(model, options)}, tmp_path)
    ids = np.random.default_rng(0).integers(0, 200, length)
    expected = reference_logits(checkpoint, torch.from_numpy(ids[None])).numpy()[0]
    runtime = exporter.open(tmp_path / target, options)
    whole, start = runtime.logits(ids.tolist()), runtime.logits(ids[:SHORT].tolist())
    assert divergences(expected, whole).mean() < 1e-6
    assert divergences(whole[:SHORT], start).mean() < 1e-6, "what comes later changes nothing before it"
