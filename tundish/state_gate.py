"""Gates on what users do with an artifact: open it as it is, read on after what is cached, read several texts at once.

`exercise` runs in the process that has the runtime, `judge` in the one that decides. What is computed with state is
held against one pass of the same artifact in the same arithmetic; what is computed as users have it against the
reference, and answers against one pass over what was said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.config import RopeKind
from converters.quantize.tensor import F32
from exporters.base import Model, Runtime, Semantics
from tundish.divergence import Divergence, compare_logits
from tundish.recipe import Gates
from tundish.results import NOT_FINITE, Gate

STATE, AS_OPENED, CHAT = "state", "as opened", "chat as opened"
_TEXT = 80  # tokens that are read
_EXERCISED = 48  # of them, the last ones are read in pieces
_PAST = 22  # tokens past a boundary: those that are read one by one lie on both sides of it
_SHORTEST = 24  # with fewer there are no pieces
_ONE_BY_ONE = 4
_ANSWER = 3  # tokens of an answer
_REGRET = 0.25  # nats by which an answer's tokens may be less likely than the likeliest: caches of 8 bits round
_MEND = "; fp32 activations, an option of the target, or a scheme with floats of a wider range may hold its numbers"
_LOOSER, _SLACK, _TOP1_SLACK = 2, 0.05, 0.2  # as users have it, on few positions: beside the exact comparison's bounds


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of a text, and what reading them in one go stands for."""

    kind: str
    start: int
    stop: int


def pieces_of(length: int) -> list[Piece]:
    """A prompt in two chunks, an answer token by token, the prompt of a second turn, and an answer to that."""
    begin = length - min(_EXERCISED, length)
    ends = [begin + (length - begin) * part // 4 for part in (1, 2)]
    turn = length - _ONE_BY_ONE // 2
    pieces = [Piece("prompt", 0, ends[0]), Piece("chunks", *ends)]
    pieces += [Piece("token by token", at, at + 1) for at in range(ends[1], ends[1] + _ONE_BY_ONE)]
    pieces += [Piece("second turn", ends[1] + _ONE_BY_ONE, turn)]
    return pieces + [Piece("token by token", at, at + 1) for at in range(turn, length)]


def boundary_of(model: Model) -> int | None:
    """LongRoPE's original context, where a runtime might change factors; None where the recipe's ends before it."""
    rope = model.graph.config.rope
    if rope.kind is not RopeKind.LONGROPE or model.context_length <= rope.original_context:
        return None
    return rope.original_context


def state_positions(model: Model) -> int:
    """How many positions' logits `exercise` writes at most."""
    short, long = 4 * _TEXT, 6 * _EXERCISED
    return short if boundary_of(model) is None else short + long


# ---- in the runtime's process ----


def exercise(
    runtime: Runtime, sequences: Sequence[Sequence[int]], context: int, boundary: int | None, folder: Path
) -> dict[str, Any]:
    """Write logits into the folder; what else there is to know comes back, and travels as JSON."""
    text = [int(token) for token in sequences[0][:_TEXT]]
    if len(text) < _SHORTEST:
        return {}
    last = len(sequences) - 1
    other = [int(token) for token in sequences[last][: len(text) // 2]]
    np.save(folder / "state-pieces.npy", _in_pieces(runtime, text))
    for index, logits in enumerate(runtime.batch([text, other])):
        np.save(folder / f"state-batch-{index}.npy", logits)
    long: list[int] = []
    if boundary is not None:
        long = np.resize(np.asarray(sequences), min(boundary + _PAST, context)).tolist()
        np.save(folder / "state-long-one.npy", runtime.logits(long)[-_EXERCISED:])
        np.save(folder / "state-long-pieces.npy", _in_pieces(runtime, long)[-_EXERCISED:])
    # Opened otherwise than before, maybe: all of that comes after all of the other.
    conversations = {name: _converse(runtime, ids) for name, ids in (("", text), ("-long", long)) if ids}
    for name, spoken in conversations.items():
        logits = runtime.as_opened(spoken["said"])
        kept = slice(None) if not name else slice(spoken["first"] - 1, None)
        np.save(folder / f"state{name}-opened.npy", logits[kept])
    return {"last": last, "conversations": conversations}


def _in_pieces(runtime: Runtime, text: Sequence[int]) -> F32:
    return runtime.continued([text[piece.start : piece.stop] for piece in pieces_of(len(text))])


def _converse(runtime: Runtime, text: Sequence[int]) -> dict[str, Any]:
    """Two turns cut from the text and the answers; together no longer than the text."""
    start = len(text) - min(_EXERCISED, len(text)) * 3 // 4
    middle = start + (len(text) - start) // 2 - 1
    turns = [text[:start], text[start:middle]]
    answers = runtime.converse(turns, _ANSWER)
    said = [token for pair in zip(turns, answers, strict=True) for part in pair for token in part]
    return {"first": start, "said": said, "answers": [len(answer) for answer in answers]}


# ---- where it is decided ----


def judge(
    gates: Gates, event: dict[str, Any], reference: Path, boundary: int | None, folder: Path, claims: Semantics
) -> list[Gate]:
    """Gates of what `exercise` wrote. `reference` has the reference's logits of the first sequence, the folder those of
    the artifact in one pass; `claims` says at which lengths it computes what the reference does."""
    if not event:
        return [Gate(name, None, detail=f"fewer than {_SHORTEST} tokens to read") for name in (STATE, AS_OPENED, CHAT)]
    one = _load(folder, "logits-0")
    pairs = list(_pieces_beside(_load(folder, "state-pieces"), one))
    for index, single in enumerate((one, _load(folder, f"logits-{event['last']}"))):
        found = _load(folder, f"state-batch-{index}")
        pairs.append(("batch", single[: len(found)], found))
    results = [_state_gate(STATE, gates, pairs)]
    if boundary is not None:
        pairs = list(_pieces_beside(_load(folder, "state-long-pieces"), _load(folder, "state-long-one")))
        results.append(_state_gate(f"{STATE} past {boundary} tokens", gates, pairs))
    spoken = event["conversations"]
    opened = _load(folder, "state-opened")
    first = spoken[""]["first"]
    divergence = _compare([(np.load(reference, mmap_mode="r")[:first], opened[:first])])
    results.append(_opened_gate(gates, divergence, len(spoken[""]["said"]) <= claims.exact_to))
    results.append(_chat_gate(CHAT, spoken[""], opened[first - 1 :]))
    if boundary is not None:
        results.append(
            _chat_gate(f"{CHAT} past {boundary} tokens", spoken["-long"], _load(folder, "state-long-opened"))
        )
    return results


def _load(folder: Path, stem: str) -> F32:
    array: F32 = np.load(folder / f"{stem}.npy", mmap_mode="r")
    return array


def _pieces_beside(found: F32, one: F32) -> Iterator[tuple[str, F32, F32]]:
    """(kind, one pass, in pieces) for each piece after the first. Both may be the last positions only."""
    one = one[: len(found)]
    pieces = pieces_of(len(found))
    for piece in pieces[1:]:
        rows = slice(piece.start, piece.stop)
        yield piece.kind, one[rows], found[rows]


def _compare(pairs: Sequence[tuple[F32, F32]]) -> Divergence:
    return compare_logits((one, found, np.full(len(found), -1, np.int64)) for one, found in pairs)


def _state_gate(name: str, gates: Gates, pairs: Sequence[tuple[str, F32, F32]]) -> Gate:
    """The worst mean KL of any kind of reading."""
    figures = {
        kind: _compare([(one, found) for of, one, found in pairs if of == kind]).kl_mean
        for kind in dict.fromkeys(kind for kind, _, _ in pairs)
    }
    detail = ", ".join(f"{kind} {'not finite' if kl is None else f'{kl:.2g}'}" for kind, kl in figures.items())
    if None in figures.values():
        return Gate(name, False, None, gates.state, detail + NOT_FINITE)
    worst = max(kl for kl in figures.values() if kl is not None)
    return Gate(name, worst <= gates.state, worst, gates.state, f"KL from one pass: {detail}")


def _opened_gate(gates: Gates, divergence: Divergence, judged: bool) -> Gate:
    """Close to the reference, if `judged`, and finite in any case."""
    most = gates.as_opened_kl
    if most is None and gates.kl is not None:
        most = _LOOSER * gates.kl + _SLACK
    least = 0.0 if gates.top1 is None else max(gates.top1 - _TOP1_SLACK, 0.0)
    if divergence.kl_mean is None:
        return Gate(AS_OPENED, False, None, most, f"its logits are not finite when opened as users open it{_MEND}")
    detail = f"{divergence.positions} positions, top-1 {divergence.top1:.1%}"
    if not judged:
        return Gate(AS_OPENED, None, divergence.kl_mean, detail=f"{detail}: longer than the artifact claims")
    if divergence.top1 < least:  # which no figure shows beside the threshold
        return Gate(AS_OPENED, False, None, None, f"{detail}, at least {least:.1%} expected")
    passed = None if most is None else divergence.kl_mean <= most
    return Gate(AS_OPENED, passed, divergence.kl_mean, most, detail)


def _chat_gate(name: str, spoken: dict[str, Any], rows: F32) -> Gate:
    """By how much the answers' tokens are less likely than the likeliest ones of one pass over all that was said.

    `rows` begin with the one that the first answer's first token is chosen from.
    """
    said, begin, (first, second) = spoken["said"], spoken["first"], spoken["answers"]
    chosen = [*range(begin, begin + first), *range(len(said) - second, len(said))]
    logits = np.asarray(rows, np.float64)[[at - begin for at in chosen]]
    regrets = logits.max(axis=-1) - logits[np.arange(len(chosen)), [said[at] for at in chosen]]
    detail = f"two answers, {len(chosen)} tokens: nats less likely than the likeliest"
    if not np.isfinite(regrets).all():
        return Gate(name, False, None, _REGRET, detail + NOT_FINITE)
    figure = float(regrets.mean()) if chosen else 0.0
    return Gate(name, figure <= _REGRET, figure, _REGRET, detail)
