"""Converted tokenizer models, put right where openvino-tokenizers' conversion differs from the tokenizers library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np
import openvino as ov
from openvino import opset15
from openvino_tokenizers.tokenizer_pipeline import RegexSplitStep
from openvino_tokenizers.utils import create_string_constant_node
from tokenizers import AddedToken

SPACE = "\u2581"
# White_Space of Unicode, which the tokenizers library strips; PCRE2's \s has U+180E besides.
BLANKS = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"
BYTE_NAME = re.compile(rb"<0x([0-9A-F]{2})>")
DIGITS_AND_WORDS = RegexSplitStep.byte_level_splitter(individual_digits=True).split_pattern


def correct_tokenizer(model: ov.Model, added: Iterable[AddedToken]) -> None:
    """Change the model's regexes in place. `added` are the tokenizer's added tokens."""
    tokens = sorted(added, key=lambda token: len(token.content), reverse=True)
    _change(model, "SpecialTokensSplit", 1, lambda _: "|".join(map(_finds, tokens)))
    # Where digits are split off first and words then, white space before a digit ends a piece: it stays together.
    kept_together = DIGITS_AND_WORDS.replace(r"(?!\S)", r"(?![^\s\p{N}])")
    _change(model, "RegexSplit", 1, lambda found: found.replace(DIGITS_AND_WORDS, kept_together))
    # What Metaspace's "first" puts before a text is left out where a space or its sign is there already.
    _change(model, "RegexNormalization", 2, lambda found: found.replace("| |$)", f"| |{SPACE}|$)"))


def correct_detokenizer(model: ov.Model) -> None:
    """Put bytes in place of their names into the vocabulary: ByteFallback takes every <....> for such a name."""
    nodes = {node.get_type_name(): node for node in model.get_ordered_ops()}
    if "ByteFallback" not in nodes:
        return
    decoder, fallback = nodes["VocabDecoder"], nodes["ByteFallback"]
    begins, ends, letters = (_constant(decoder, place).get_data() for place in (1, 2, 3))
    text = letters.tobytes()
    words = [text[begin:end] for begin, end in zip(begins, ends, strict=True)]
    named = [bytes.fromhex(name[1].decode()) if (name := BYTE_NAME.fullmatch(word)) else word for word in words]
    for place, output in enumerate(create_string_constant_node(named), 1):
        decoder.input(place).replace_source_output(output)
    for place, output in enumerate(fallback.outputs()):
        for port in list(output.get_target_inputs()):
            port.replace_source_output(fallback.input(place).get_source_output())


def _finds(token: AddedToken) -> str:
    """Finds an added token in text that is not normalized; the token itself is the group."""
    return BLANKS * token.lstrip + f"({re.escape(token.content)})" + BLANKS * token.rstrip


def _change(model: ov.Model, kind: str, place: int, change: Callable[[str], str]) -> None:
    """Change the text that is input `place`, from the end, of each operation of this kind."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == kind:
            place_from_start = node.get_input_size() - place
            data = _constant(node, place_from_start).get_data().tobytes()
            changed = np.frombuffer(change(data.decode()).encode(), np.uint8)
            node.input(place_from_start).replace_source_output(opset15.constant(changed).output(0))


def _constant(node: ov.Node, place: int) -> ov.Node:
    return node.input(place).get_source_output().get_node()
