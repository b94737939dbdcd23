"""Opens every artifact in its own runtime and compares it with the reference: codes, tokens, prompts, logits, answers.

The reference of logits is the interpreter on the checkpoint's own float32 numbers; that of token ids is transformers'
tokenizer, that of prompts its chat template; that of codes are the digests taken while the weights were poured.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.arrays import NUMPY, computing_by
from converters.config import RopeKind
from converters.errors import UsageError
from converters.interpret import WeightRows, interpret
from converters.ops import OPS, Linear
from converters.quantize.tensor import F32
from converters.source import Source
from converters.tokenizer_json import fast_tokenizer
from exporters.base import Exporter, Model, Semantics, Target
from tundish.chat_gate import compared, expected_prompts
from tundish.chat_gate import judge as judge_chat
from tundish.child import run_child
from tundish.divergence import Divergence, compare_logits
from tundish.heldout import evaluation_text
from tundish.recipe import Evaluation, Gates, Recipe
from tundish.results import AGREEMENT, NOT_FINITE, Gate, TargetResult, measured
from tundish.state_gate import boundary_of, judge, state_positions
from tundish.token_corpus import generated_texts
from tundish.token_gates import TokenReference, token_gates, token_reference
from tundish.worker import Request

LONG_GATE = "kl past the LongRoPE boundary"
LONG_TAIL = 64  # positions past the LongRoPE boundary that are compared
_BESIDE_LOGITS = 16 << 20  # bytes of token ids, logs and what a runtime leaves, generously
_FEWEST_TOKENS = 64  # of held-out text, however large the model is
_SHOWN_ANSWER = 60  # characters of one that does not end


@dataclass(frozen=True, slots=True)
class Reference:
    """What every artifact is held against. Logits lie in .npy files, since they are large."""

    texts: tuple[str, ...]
    tokens: TokenReference | None  # None: transformers is not installed
    prompts: tuple[str | None, ...] | None  # see tundish.chat_gate.expected_prompts
    sequences: NDArray[np.int64]
    logits: tuple[Path, ...]
    long_sequences: NDArray[np.int64] | None
    long_logits: tuple[Path, ...]


def verify(
    model: Model,
    source: Source,
    recipe: Recipe,
    exporters: Mapping[Target, Exporter],
    artifacts: Path,
    digests: Mapping[str, str],
    scratch: Path,
    threads: int,
    say: Callable[[str], None],
    known: Mapping[Target, TargetResult] | None = None,
    done: Callable[[TargetResult], None] = lambda result: None,
) -> tuple[TargetResult, ...]:
    """Verify artifacts/<target> for each target of the recipe, one runtime after the other.

    Results that are `known` are taken as they are; `done` is told each of the others. `scratch`, a folder, has the
    reference's logits and those of one artifact at a time: `verifying_bytes` at most.
    """
    missing = {target: missing_runtime(exporters[target]) for target in recipe.targets}
    results = {target: _not_verified(target, missing[target], recipe) for target in recipe.targets if missing[target]}
    results = {**(known or {}), **results}
    present = [target for target in recipe.targets if target not in results]
    if present:
        say("reference: the interpreter reads the held-out text in float32")
        with computing_by(NUMPY):  # wherever the calibration was computed
            reference = make_reference(model, source, recipe, scratch, threads)
    for target in present:
        say(f"{target}: opening in its runtime")
        with tempfile.TemporaryDirectory(dir=scratch) as own:
            result = results[target] = _verify_target(
                model, source, recipe, exporters[target], artifacts / target, digests, reference, Path(own), threads
            )
        done(result)
        kl = None if result.divergence is None else result.divergence.kl_mean
        figure = "" if kl is None else f", KL {kl:.4g}"
        say(f"{target}: {'gates missed' if result.passed is False else 'verified'}{figure}")
    return tuple(results[target] for target in recipe.targets)


def missing_runtime(exporter: Exporter) -> list[str]:
    """The import names that the artifact's runtime needs and that are not installed."""
    return [name for name in exporter.runtime_requires if importlib.util.find_spec(name.split(".")[0]) is None]


def _not_verified(target: Target, missing: Sequence[str], recipe: Recipe) -> TargetResult:
    required = target in recipe.verify.required
    detail = f"{', '.join(missing)} not installed" + ("; the recipe requires this runtime" if required else "")
    return TargetResult(target, (Gate("runtime", False if required else None, detail=detail),))


# ---- reference ----


def make_reference(model: Model, source: Source, recipe: Recipe, folder: Path, threads: int) -> Reference:
    """Token ids, held-out sequences and their float32 logits."""
    texts = generated_texts(model.tokenizer)
    stream = stream_of(model, evaluation_text())
    sequences = cut(stream, *evaluation_shape(recipe, model))
    long_sequences = None
    beyond = long_length(model)
    if beyond is not None:
        long_sequences = cut(np.resize(stream, max(len(stream), beyond)), 1, beyond)
    return Reference(
        texts=texts,
        tokens=token_reference(source, texts, folder, threads),
        prompts=() if model.tokenizer.chat_template is None else expected_prompts(source.folder, folder, threads),
        sequences=sequences,
        logits=reference_logits(model, sequences, folder, "reference"),
        long_sequences=long_sequences,
        long_logits=()
        if long_sequences is None
        else reference_logits(model, long_sequences, folder, "long-reference", LONG_TAIL),
    )


def evaluation_shape(recipe: Recipe, model: Model) -> tuple[int, int]:
    """How many sequences of how many held-out tokens serve every target of the recipe."""
    shapes = [text_shape(recipe.verify.for_target(target).text, model) for target in recipe.targets]
    return max(count for count, _ in shapes), max(length for _, length in shapes)


def text_shape(text: Evaluation, model: Model) -> tuple[int, int]:
    """How many sequences of how many held-out tokens a target reads: fewer, then shorter ones within `teraflops`."""
    length = min(text.length, model.context_length)
    if text.teraflops is None:
        return text.sequences, length
    graph = model.graph
    multiplied = sum(
        math.prod(graph.weights[name].shape)
        for node in graph.nodes
        if isinstance(node.op, Linear)
        for name in node.op.weights
    )
    tokens = max(_FEWEST_TOKENS, int(text.teraflops * 1e12 / (2 * multiplied)))
    return max(1, min(text.sequences, tokens // length)), min(length, tokens)


def verifying_bytes(model: Model, recipe: Recipe) -> int:
    """Bytes that `verify` has on the disk at most: float32 logits of the reference and of one artifact."""
    sequences, length = evaluation_shape(recipe, model)
    positions = sequences * length + (0 if long_length(model) is None else LONG_TAIL)
    positions = 2 * positions + state_positions(model)
    return 4 * positions * model.graph.config.vocab_size + _BESIDE_LOGITS


def long_length(model: Model) -> int | None:
    """The length of the sequence past the LongRoPE boundary; None if the context ends before it."""
    rope = model.graph.config.rope
    if rope.kind is not RopeKind.LONGROPE or model.context_length <= rope.original_context:
        return None
    return min(rope.original_context + LONG_TAIL, model.context_length)


def stream_of(model: Model, texts: Iterable[str]) -> NDArray[np.int64]:
    """Texts as one stream of token ids."""
    fast = fast_tokenizer(model.tokenizer)
    fast.no_truncation()
    ids = [fast.encode(text, add_special_tokens=False).ids for text in texts]
    return np.array([token for text in ids for token in text], np.int64)


def cut(stream: NDArray[np.int64], count: int, length: int, where: str = "held-out text") -> NDArray[np.int64]:
    """The stream's first tokens as i64[count, length]; UsageError, with where they are from, if there are too few."""
    if len(stream) < count * length:
        raise UsageError(
            "the text is too short for the evaluation",
            where=where,
            expected=f"{count} sequences of {length} tokens",
            found=f"{len(stream):,} tokens",
            mend="Lower verify.text in the recipe, or what --sequences and --length ask for.",
        )
    return stream[: count * length].reshape(count, length)


def reference_logits(
    model: Model, sequences: NDArray[np.int64], folder: Path, stem: str, tail: int | None = None
) -> tuple[Path, ...]:
    """Save float32 logits [length or tail, vocab] of each sequence; the head runs on one sequence at a time."""
    head = model.graph.nodes[-1]
    hidden = interpret(model.graph, sequences, stop_at=head.inputs[0])
    weights = [WeightRows(model.graph.weights[name]) for name in head.op.weights]
    paths = []
    for index, states in enumerate(hidden):
        path = folder / f"{stem}-{index}.npy"
        np.save(path, OPS[Linear].reference(head.op, [states[-tail if tail else None :]], weights))
        paths.append(path)
    return tuple(paths)


# ---- one artifact ----


def _verify_target(
    model: Model,
    source: Source,
    recipe: Recipe,
    exporter: Exporter,
    artifact: Path,
    digests: Mapping[str, str],
    reference: Reference,
    folder: Path,
    threads: int,
) -> TargetResult:
    settings = recipe.verify.for_target(exporter.target)
    count, length = text_shape(settings.text, model)
    sequences = reference.sequences[:count, :length]
    np.save(folder / "sequences.npy", sequences)
    semantics = exporter.semantics(model, recipe.targets[exporter.target])
    beyond = reference.long_sequences
    if beyond is not None:
        claimed = beyond.shape[1] <= semantics.exact_to
        beyond = beyond if claimed and settings.gates.longrope_boundary else None
    if beyond is not None:
        np.save(folder / "long.npy", beyond)
    boundary = boundary_of(model) if settings.gates.longrope_boundary else None
    request = Request(
        target=exporter.target,
        artifact=str(artifact),
        source=str(source.folder),
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        schemes={name: weight.scheme.name for name, weight in model.graph.weights.items()},
        folder=str(folder),
        texts=list(reference.texts),
        conversations=compared(reference.prompts) if settings.gates.chat else [],
        token_ids=[] if reference.tokens is None else [list(ids) for ids in reference.tokens.ids],
        sequences=str(folder / "sequences.npy"),
        long_sequences=None if beyond is None else str(folder / "long.npy"),
        tail=LONG_TAIL,
        boundary=boundary,
        question=settings.answer.prompt,
        max_tokens=settings.answer.max_tokens,
    )
    (folder / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
    ending = run_child(
        "tundish.worker", [str(folder / "request.json")], folder / "log.txt", settings.time_limit, threads
    )
    events = _read_events(folder / "events.jsonl")
    gates = settings.gates
    results: list[Gate] = []
    if ending.failure:
        results.append(Gate("runtime", False, detail=f"the runtime process {ending.failure}"))
    else:
        note = events["open"]["note"]
        results.append(Gate("runtime", True, detail="opened, ran and closed" + (f"; {note}" if note else "")))
    divergence = None
    differences = exporter.differences(model, recipe.targets[exporter.target])
    if "codes" in events and gates.codes_equal:
        results.append(_codes_gate(digests, events["codes"]["digests"]))
    if "tokens" in events:
        found = events["tokens"]
        results += token_gates(
            reference.texts, reference.tokens, found["ids"], found["decoded"], differences, gates.tokens
        )
    if "chat" in events and gates.chat:
        results.append(judge_chat(reference.prompts, events["chat"]["prompts"], differences))
    if "logits" in events:
        divergence = divergence_of(reference.logits, sequences, folder, "logits")
        if sequences.shape[1] <= semantics.exact_to:
            results += _logit_gates(gates, divergence)
        else:
            results.append(_outside(divergence, sequences.shape[1], semantics))
    if "state" in events:
        results += judge(gates, events["state"], reference.logits[0], boundary, folder, semantics)
    if "answer" in events and gates.stops:
        answer = events["answer"]
        results.append(Gate("stops", answer["stopped"], detail=_answer_detail(answer)))
    elif gates.stops and model.tokenizer.chat_template is None:
        results.append(Gate("stops", None, detail="the model has no chat template"))
    if "long" in events:
        results.append(_long_gate(gates, reference, folder))
    elif reference.long_sequences is not None and beyond is None:
        results.append(Gate(LONG_GATE, None, detail="not asked for by the recipe, or not claimed by the artifact"))
    return TargetResult(
        exporter.target,
        tuple(results),
        events.get("open", {}).get("versions", {}),
        divergence,
        events.get("answer", {}).get("text"),
    )


def _read_events(path: Path) -> dict[str, dict[str, Any]]:
    """The steps that the child finished; a line that it was killed in the middle of is none."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return {event["step"]: event for event in map(json.loads, lines)}


def _codes_gate(expected: Mapping[str, str], found: Mapping[str, str]) -> Gate:
    differing = sorted(name for name in expected if found.get(name) != expected[name])
    extra = sorted(set(found) - set(expected))
    detail = f"{len(expected)} matrices equal bit for bit"
    if differing or extra:
        detail = f"{len(differing)} of {len(expected)} matrices differ: " + ", ".join((differing + extra)[:4])
    return Gate("codes", not differing and not extra, float(len(differing) + len(extra)), 0.0, detail)


def _answer_detail(answer: dict[str, Any]) -> str:
    count, text = len(answer["token_ids"]), answer["text"].strip()
    if answer["stopped"]:
        return f"{count} tokens: {text!r}"
    return f"no stop token in {count} tokens (verify.answer.max_tokens), which begin {text[:_SHOWN_ANSWER]!r}"


def divergence_of(logits: Sequence[Path], sequences: NDArray[np.int64], folder: Path, stem: str) -> Divergence:
    """Of the logits in folder/<stem>-<index>.npy from the reference's. They may be the last positions only."""

    def pairs() -> Iterator[tuple[F32, F32, NDArray[np.int64]]]:
        for index, ids in enumerate(sequences):
            found: F32 = np.load(folder / f"{stem}-{index}.npy", mmap_mode="r")
            expected: F32 = np.load(logits[index], mmap_mode="r")[: len(found)]
            following = np.append(ids[1:], -1)[-len(found) :]
            yield expected, found, following

    return compare_logits(pairs())


def _logit_gates(gates: Gates, divergence: Divergence) -> list[Gate]:
    detail = f"{divergence.positions} positions"
    return [
        measured("kl", divergence.kl_mean, gates.kl, detail),
        measured(AGREEMENT, divergence.top1, gates.top1, detail),
    ]


def _outside(divergence: Divergence, length: int, semantics: Semantics) -> Gate:
    detail = f"not judged at {length} tokens: the artifact claims {semantics.exact_to} at most"
    detail += "" if divergence.kl_mean is not None else NOT_FINITE
    return Gate("kl", None, divergence.kl_mean, detail=detail)


def _long_gate(gates: Gates, reference: Reference, folder: Path) -> Gate:
    assert reference.long_sequences is not None
    divergence = divergence_of(reference.long_logits, reference.long_sequences, folder, "long")
    detail = f"last {divergence.positions} positions of {reference.long_sequences.shape[1]}"
    return measured(LONG_GATE, divergence.kl_mean, gates.kl, detail)
