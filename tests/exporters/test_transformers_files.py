"""Configuration files in transformers' spelling."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exporters.transformers_files import decoder_config, generation_config
from tests.exporters.tiny_graphs import BASE, byte_tokenizer, model_of, random_graph


@pytest.mark.parametrize(
    ("stated", "own", "expected"),
    [
        ((2,), (2,), 2),
        ((7, 5), (5, 7), [7, 5]),  # the model's order
        ((), (2,), 2),
        ((), (2, 3), [2, 3]),
    ],
)
def test_every_eos_that_other_containers_have_is_stated(
    stated: tuple[int, ...], own: tuple[int, ...], expected: int | list[int]
) -> None:
    """A checkpoint may leave it to its tokenizer."""
    graph = random_graph(replace(BASE, eos_token_ids=stated))
    model = model_of(graph, tokenizer=replace(byte_tokenizer(), eos_ids=own))
    assert generation_config(model)["eos_token_id"] == expected
    assert decoder_config(model, 64, None, "float32")["eos_token_id"] == expected
