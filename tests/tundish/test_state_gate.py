"""What users do with an artifact is tried, and each way to be wrong fails its own gate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.quantize.tensor import F32
from exporters.base import Runtime, Semantics
from tests.tundish.tiny import QUIET, write_recipe
from tundish.gates import FailedGatesError
from tundish.job import Choices, build
from tundish.recipe import Gates
from tundish.results import Gate
from tundish.state_gate import exercise, judge, pieces_of

VOCAB = 50
WHOLE = Semantics("", 1000)
GATES = Gates(kl=0.01, top1=0.9)


class Exact:
    """A runtime whose logits depend on the last three tokens and their position. Each subclass gets one thing wrong."""

    note = ""

    def logits(self, token_ids: Sequence[int]) -> F32:
        return np.stack([self.row(token_ids[: at + 1], at) for at in range(len(token_ids))])

    def row(self, before: Sequence[int], position: int) -> F32:
        seed = [position, *before[-3:]]
        return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * 3

    def continued(self, pieces: Sequence[Sequence[int]]) -> F32:
        return self.logits([token for piece in pieces for token in piece])

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[F32]:
        return [self.logits(ids) for ids in sequences]

    def as_opened(self, token_ids: Sequence[int]) -> F32:
        return self.logits(token_ids)

    def converse(self, turns: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        said: list[int] = []
        answers: list[list[int]] = []
        for turn in turns:
            said += turn
            answers.append([])
            for _ in range(count):
                answers[-1].append(int(self.row(said, len(said) - 1).argmax()))
                said.append(answers[-1][-1])
        return answers


class Forgetful(Exact):
    """Forgets what came before a piece of several tokens, so chunks and turns are wrong."""

    def continued(self, pieces: Sequence[Sequence[int]]) -> F32:
        found, before = [], list[int]()
        for piece in pieces:
            whole = self.logits([*before, *piece])
            found.append(self.logits(piece) if before and len(piece) > 1 else whole[len(before) :])
            before += piece
        return np.concatenate(found)


class Padded(Exact):
    """Takes padding for text where lengths differ."""

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[F32]:
        longest = max(map(len, sequences))
        return [self.logits([0] * (longest - len(ids)) + list(ids))[longest - len(ids) :] for ids in sequences]


class Overflowing(Exact):
    def as_opened(self, token_ids: Sequence[int]) -> F32:
        return np.full((len(token_ids), VOCAB), np.nan, np.float32)


class Rough(Exact):
    """Other distributions than its own in one pass, as users have it."""

    def as_opened(self, token_ids: Sequence[int]) -> F32:
        return self.logits([token + 1 for token in token_ids])


class Stale(Exact):
    """Answers a second turn without what was said in the first."""

    def converse(self, turns: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        return [Exact.converse(self, [turn], count)[0] for turn in turns]


def judged(
    runtime: Exact, folder: Path, boundary: int | None = None, claims: Semantics = WHOLE, gates: Gates = GATES
) -> dict[str, Gate]:
    sequences = np.random.default_rng(7).integers(1, VOCAB, (2, 90))
    for index, ids in enumerate(sequences):
        np.save(folder / f"reference-{index}.npy", Exact().logits(ids.tolist()))
        np.save(folder / f"logits-{index}.npy", runtime.logits(ids.tolist()))
    event = json.loads(json.dumps(exercise(cast(Runtime, runtime), sequences.tolist(), 200, boundary, folder)))
    results = judge(gates, event, folder / "reference-0.npy", boundary, folder, claims)
    return {gate.name: gate for gate in results}


def test_a_runtime_that_is_right(tmp_path: Path) -> None:
    results = judged(Exact(), tmp_path, boundary=130)
    past = ["state past 130 tokens", "chat as opened past 130 tokens"]
    assert sorted(results) == sorted(["state", "as opened", "chat as opened", *past])
    assert all(gate.passed and gate.figure == 0 for gate in results.values()), results


@pytest.mark.parametrize(
    ("runtime", "failed", "word"),
    [
        (Forgetful(), {"state", "state past 130 tokens"}, "second turn"),
        (Padded(), {"state"}, "batch"),
        (Rough(), {"as opened", "chat as opened", "chat as opened past 130 tokens"}, "top-1"),
        (Stale(), {"chat as opened", "chat as opened past 130 tokens"}, "two answers"),
        (Overflowing(), {"as opened", "chat as opened", "chat as opened past 130 tokens"}, "finite"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exact) else "",
)
def test_what_is_wrong_fails(runtime: Exact, failed: set[str], word: str, tmp_path: Path) -> None:
    results = judged(runtime, tmp_path, boundary=130)
    assert {name for name, gate in results.items() if not gate.passed} == failed
    assert any(word in results[name].detail for name in failed)


def test_what_an_artifact_does_not_claim_is_not_judged_but_has_to_be_finite(tmp_path: Path) -> None:
    short = Semantics("", 40)
    assert judged(Rough(), tmp_path, claims=short)["as opened"].passed is None
    gate = judged(Overflowing(), tmp_path, claims=short)["as opened"]
    assert gate.passed is False and "fp32 activations" in gate.detail


def test_bounds_are_the_recipes(tmp_path: Path) -> None:
    """Without any, what users have is measured, and only has to be finite."""
    assert judged(Rough(), tmp_path, gates=Gates())["as opened"].passed is None
    assert judged(Rough(), tmp_path, gates=Gates(as_opened_kl=100))["as opened"].passed
    assert judged(Forgetful(), tmp_path, gates=Gates(state=100))["state"].passed


@pytest.mark.parametrize("length", [24, 64, 80, 4118])
def test_pieces_are_the_whole_text(length: int) -> None:
    pieces = pieces_of(length)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == length and all(piece.start < piece.stop for piece in pieces)
    assert {piece.kind for piece in pieces} == {"prompt", "chunks", "token by token", "second turn"}


def test_a_text_of_few_tokens_has_no_pieces(tmp_path: Path) -> None:
    assert exercise(cast(Runtime, Exact()), [[1, 2, 3]], 200, None, tmp_path) == {}
    assert {gate.passed for gate in judge(GATES, {}, tmp_path, None, tmp_path, WHOLE)} == {None}


def test_numbers_beyond_fp16_are_not_published_as_fp16(checkpoint: Path, tmp_path: Path) -> None:
    """A residual stream of 3e5: exact in float32, where one pass is compared, and NaN in mlx_lm.load's own fp16."""
    pytest.importorskip("mlx_lm")
    loud = tmp_path / "loud"
    loud.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (loud / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        scaled = {name: value * (3e4 if "down_proj" in name else 1) for name, value in tensors.items()}
        save_file(
            {name: value.to(torch.bfloat16) for name, value in scaled.items()}, loud / path.name, {"format": "pt"}
        )

    verify = {
        "text": {"sequences": 1, "length": 64},
        "answer": {"prompt": "Hi", "max_tokens": 2},
        "gates": {"kl": 0.1, "top1": 0.7, "stops": False, "tokens": 1.0},
    }
    schemes = {"default": "int8_g32"}
    recipe = write_recipe(tmp_path / "a.yaml", loud, context=256, schemes=schemes, targets={"mlx": {}}, verify=verify)
    with pytest.raises(FailedGatesError) as caught:
        build(Choices(str(recipe), out=tmp_path / "out"), QUIET)
    gates = {gate["name"]: gate for gate in caught.value.manifest["verification"]["mlx"]["gates"]}
    assert gates["kl"]["passed"] and gates["state"]["passed"], "in float32 nothing is wrong"
    assert gates["as opened"]["passed"] is False and "fp32 activations" in gates["as opened"]["detail"]
    assert "mlx as opened" in str(caught.value) and not (tmp_path / "out").exists()
