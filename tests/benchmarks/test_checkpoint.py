"""Generated checkpoints are what transformers and tundish take for one of the family."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from benchmarks.checkpoint import DEVIATION, SHAPES, TOKENS, Shape, config, tensors, write_checkpoint
from converters.load import load_graph
from converters.tokenizer import read_tokenizer

BILLIONS = {"phi-3.5-mini": 3.82, "phi-4": 14.66, "llama-70b": 70.55}
CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def tiny(name: str) -> Shape:
    """The named shape with narrow matrices and two layers."""
    shape = SHAPES[name]
    rope = dict(shape.rope)
    if name == "phi-3.5-mini":
        factors = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        rope["rope_scaling"] = factors
    return replace(shape, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocab=TOKENS + 5, rope=rope)


@pytest.mark.parametrize("name", BILLIONS)
def test_named_shapes_have_their_number_of_parameters(name):
    assert SHAPES[name].parameters / 1e9 == pytest.approx(BILLIONS[name], abs=0.006)


def test_phi_3_5_mini_agrees_with_the_published_config():
    published = json.loads((CONFIGS / "phi-3.5-mini-instruct" / "config.json").read_text())
    ours = config(SHAPES["phi-3.5-mini"])
    differing = {key for key in ours if ours[key] != published[key]}
    assert differing == {"rope_scaling"}  # its factors are tuned
    scaling = ours["rope_scaling"]
    assert isinstance(scaling, dict)
    assert {key: len(scaling[key]) for key in ("short_factor", "long_factor")} == {
        "short_factor": 48,
        "long_factor": 48,
    }


@pytest.mark.parametrize("name", BILLIONS)
def test_every_family_loads_with_every_tensor_consumed(name, tmp_path):
    shape = tiny(name)
    write_checkpoint(shape, tmp_path / "m", shard_nbytes=3_000_000)
    graph = load_graph(tmp_path / "m")
    assert graph.config.num_layers == 2
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 1
    tokenizer = read_tokenizer(tmp_path / "m", graph.config)
    assert tokenizer.tokens[32007].text == "<|end|>"
    found: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        with safe_open(shard, "np") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
    assert found == dict(tensors(shape))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == 2 * shape.parameters


def test_weights_are_normal_and_rows_differ(tmp_path):
    shape = replace(tiny("phi-4"), layers=1, vocab=40000)
    write_checkpoint(shape, tmp_path / "m")
    graph = load_graph(tmp_path / "m")
    values = graph.weights["embedding"].source.read(0, 40000).astype(np.float32)
    assert abs(values.mean()) < 1e-4
    assert values.std() == pytest.approx(DEVIATION, rel=0.01)
    assert len(np.unique(values[:, :8], axis=0)) == len(values)


def test_the_same_arguments_give_the_same_bytes_and_a_taken_folder_is_refused(tmp_path):
    shape = tiny("llama-70b")
    for name in "ab":
        write_checkpoint(shape, tmp_path / name, seed=3)
    write_checkpoint(shape, tmp_path / "c", seed=4)
    a, b, c = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc")
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {"model-00001-of-00001.safetensors"}
    with pytest.raises(FileExistsError):
        write_checkpoint(shape, tmp_path / "a")


def test_the_command_line_cuts_layers(tmp_path):
    command = [sys.executable, "-m", "benchmarks.checkpoint", "small", str(tmp_path / "m"), "--layers", "2"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    assert "billion parameters" in said
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_hidden_layers"] == 2
