"""llama.cpp, reading the keys written here, makes the token ids that transformers makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFValueType
from tokenizers import Tokenizer as FastTokenizer

pytest.importorskip("xllamacpp")
transformers = pytest.importorskip("transformers")

from converters.config import ModelConfig, read_config  # noqa: E402
from converters.errors import ModelError  # noqa: E402
from converters.tokenizer import SpacePrefix, Token, Tokenizer, TokenType, read_tokenizer  # noqa: E402
from exporters.gguf.differences import tokenizer_differences  # noqa: E402
from exporters.gguf.pretokenizer import ROWS, PreTokenizerRow, identify_pre  # noqa: E402
from exporters.gguf.vocab import (  # noqa: E402
    safe_general_name,
    stop_ids,
    tokenizer_metadata,
)
from tests.converters.tiny_tokenizers import (  # noqa: E402
    LLAMA3,
    O200K,
    TEKKEN,
    config,
    gate_texts,
    mistral_file,
    sentencepiece_json,
    write_byte_level,
    write_json,
    write_sentencepiece,
)
from tests.exporters.gguf.llama_vocab import open_vocab  # noqa: E402


def differing(folder: Path, scratch: Path, model: ModelConfig, name: str = "test") -> list[str]:
    """The texts whose ids in llama.cpp are not those of transformers, with special tokens and without."""
    tokenizer = read_tokenizer(folder, model)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    llama = open_vocab(scratch, tokenizer, name)
    try:
        return [
            text
            for text in gate_texts(tokenizer)
            for special in (True, False)
            if llama.encode(text, special) != reference(text, add_special_tokens=special)["input_ids"]
        ]
    finally:
        llama.close()


def phi3(folder: Path) -> ModelConfig:
    return write_sentencepiece(folder, phi3=True)


def phi3_json(folder: Path) -> ModelConfig:
    """Phi-3 as published: tokenizer.json beside tokenizer.model."""
    model = phi3(folder)
    fast = FastTokenizer.from_str(sentencepiece_json())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = settings["added_tokens_decoder"].values()
    from tokenizers import AddedToken

    fast.add_tokens([AddedToken(t.pop("content"), **t) for t in tokens])
    fast.save(str(folder / "tokenizer.json"))
    return model


def llama2_json_only(folder: Path) -> ModelConfig:
    """No tokenizer.model: the scores come from the merges."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(sentencepiece_json())
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend"})
    return config(32000, (2,), bos=1)


def no_space_prefix(folder: Path) -> ModelConfig:
    return write_sentencepiece(folder, add_prefix_space=False, legacy=False)


def llama3(folder: Path) -> ModelConfig:
    model = write_byte_level(folder, LLAMA3, ignore_merges=True)
    root = json.loads((folder / "tokenizer.json").read_text())
    token = "<|im_start|>"
    bos = model.eos_token_ids[0] - 1
    root["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
            },
        ],
    }
    (folder / "tokenizer.json").write_text(json.dumps(root))
    return model


def phi4(folder: Path) -> ModelConfig:
    """cl100k's regex the way Phi-4's file writes it: what matches is kept, merges are heeded."""
    model = replace(write_byte_level(folder, LLAMA3, tokenizer_class="GPT2Tokenizer"), family="phi3")
    write_json(folder / "config.json", {"model_type": "phi3"})
    root = json.loads((folder / "tokenizer.json").read_text())
    root["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    root["model"]["merges"] = [" ".join(pair) for pair in root["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(root))
    return model


EQUAL: dict[str, tuple[Callable[[Path], ModelConfig], str]] = {
    "llama2": (lambda folder: write_sentencepiece(folder, tokenizer_class="TokenizersBackend"), "default"),
    "llama2, tokenizer.json only": (llama2_json_only, "default"),
    "no space prefix": (no_space_prefix, "default"),
    "phi3": (phi3, "default"),
    "phi3 with tokenizer.json": (phi3_json, "default"),
    "gpt-2": (lambda folder: write_byte_level(folder, None), "gpt-2"),
    "smollm": (lambda folder: write_byte_level(folder, None, digits=True), "smollm"),
    "llama3": (llama3, "llama-bpe"),
    "phi4": (phi4, "dbrx"),
    "qwen2": (lambda folder: write_byte_level(folder, LLAMA3.replace("{1,3}", "")), "qwen2"),
}


@pytest.mark.parametrize("case", EQUAL)
def test_ids_equal_transformers(case: str, tmp_path: Path) -> None:
    write, pre = EQUAL[case]
    model = write(tmp_path / "model")
    tokenizer = read_tokenizer(tmp_path / "model", model)
    keys = {entry.key: entry.value for entry in tokenizer_metadata(tokenizer)}
    assert keys["tokenizer.ggml.pre"] == pre
    declared = {each.name for each in tokenizer_differences(tokenizer) if each.of == "encoding"}
    assert declared <= {"other white space after a token"}  # which these texts do not have
    assert differing(tmp_path / "model", tmp_path, model, "Phi-3.5-mini") == []


@pytest.mark.slow
def test_the_samples_ids_equal_transformers(tmp_path: Path) -> None:
    from tundish.sample import cached_sample

    folder = cached_sample()
    assert identify_pre(read_tokenizer(folder, read_config(folder))).name == "smollm"
    assert differing(folder, tmp_path, read_config(folder)) == []


@pytest.mark.parametrize(("pattern", "pre", "most"), [(TEKKEN, "tekken", 15), (O200K, "granite-embed-multi-97m", 4)])
def test_an_approximation_says_so(pattern: str, pre: str, most: int, tmp_path: Path) -> None:
    model = write_byte_level(tmp_path / "model", pattern)
    tokenizer = read_tokenizer(tmp_path / "model", model)
    assert identify_pre(tokenizer).name == pre
    assert any("ÉCOLE" in each.sentence for each in tokenizer_differences(tokenizer))
    texts = set(differing(tmp_path / "model", tmp_path, model))
    assert 0 < len(texts) <= most
    assert not any(text.isascii() for text in texts)


@pytest.mark.parametrize("row", [row for row in ROWS if row.name != "dbrx"], ids=lambda row: row.name)
def test_the_table_says_what_llama_cpp_does(row: PreTokenizerRow, tmp_path: Path) -> None:
    """A tokenizer that splits by llama.cpp's own regexes is that row, exactly, and gets equal ids."""
    model = write_byte_level(tmp_path / "model", row.patterns[0], ignore_merges=row.ignore_merges)
    root = json.loads((tmp_path / "model/tokenizer.json").read_text())
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in row.patterns
    ]
    root["pre_tokenizer"]["pretokenizers"][:-1] = steps
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(root))
    tokenizer = read_tokenizer(tmp_path / "model", model)
    assert identify_pre(tokenizer) is row
    assert differing(tmp_path / "model", tmp_path, model) == []


def test_a_split_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, LLAMA3.replace("{1,3}", "{1,2}"))
    with pytest.raises(ModelError, match=r"no pre-tokenizer that cuts text.*\{1,2\}"):
        tokenizer_metadata(read_tokenizer(tmp_path, model))


def test_ignore_merges_matters_only_for_words_that_merges_do_not_make(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path, write_byte_level(tmp_path, LLAMA3))
    other = replace(tokenizer, split_patterns=(LLAMA3.replace("{1,3}", ""),), ignore_merges=True)
    assert identify_pre(other).name == "qwen2"
    with pytest.raises(ModelError, match="ignore_merges true"):
        identify_pre(replace(other, merges=other.merges[:-1]))


def test_a_space_at_the_start_only_cannot_be_said(tmp_path: Path) -> None:
    """llama.cpp's ids are right from the first special token on, as in a chat."""
    model = write_sentencepiece(tmp_path / "model", legacy=False)
    tokenizer = read_tokenizer(tmp_path / "model", model)
    assert tokenizer.space_prefix is SpacePrefix.FIRST
    assert any("space in front" in each.sentence for each in tokenizer_differences(tokenizer))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    llama = open_vocab(tmp_path, tokenizer)
    chat = "<s>[INST] Hello there [/INST] Hi!</s>[INST] Bye [/INST]"
    assert llama.encode(chat, special=False) == reference(chat, add_special_tokens=False)["input_ids"]
    assert llama.encode("Hello", special=False) != reference("Hello", add_special_tokens=False)["input_ids"]


def test_every_stop_token_of_phi3_stops_in_llama_cpp(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path, phi3(tmp_path))
    assert tokenizer.eos_ids == (32000, 32007, 32001)
    llama = open_vocab(tmp_path, tokenizer)
    assert [llama.stops(index) for index in (32000, 32001, 32007, 32006, 32010)] == [True, True, True, False, False]


def test_three_unknown_stop_tokens_stop_and_four_are_refused(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path, write_byte_level(tmp_path, None))
    three = replace(tokenizer, eos_ids=(300, 301, 302))
    llama = open_vocab(tmp_path, three)
    assert [llama.stops(index) for index in range(299, 304)] == [False, True, True, True, False]
    with pytest.raises(ModelError, match="would not stop"):
        stop_ids(replace(tokenizer, eos_ids=(300, 301, 302, 303)))
    known = tokenizer.eos_ids  # <|im_end|> and <|endoftext|> need no key
    assert stop_ids(replace(tokenizer, eos_ids=(300, *known, 302))) == (300, 302, known[0])


def test_a_stop_token_that_llama_cpp_unmakes_is_refused(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path, write_byte_level(tmp_path, None))
    texts = ("<|end|>", "<|return|>", "<|call|>")
    tokens = (*tokenizer.tokens[:-3], *(Token(text, TokenType.CONTROL) for text in texts))
    with pytest.raises(ModelError, match=r"<\|end\|>"):
        stop_ids(replace(tokenizer, tokens=tokens, eos_ids=(len(tokens) - 3,)))


@pytest.mark.parametrize("name", ["smol-phi3", "Phi-3.5-mini", "a PHI3"])
def test_a_name_like_phi3_does_not_break_other_tokenizers(name: str, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path, write_byte_level(tmp_path, None))
    safe = safe_general_name(name, tokenizer)
    assert safe.lower().replace(" ", "") == name.lower().replace("-3", "3").replace(" ", "")
    open_vocab(tmp_path, tokenizer, name).close()


def test_phi3_gets_a_name_that_gives_its_tokens_rstrip(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path, phi3(tmp_path))
    assert safe_general_name("Phi-3.5-mini", tokenizer) == "Phi-3.5-mini"
    assert safe_general_name("my tune", tokenizer) == "my tune (Phi-3)"


def test_white_space_that_llama_cpp_cannot_give_to_a_token_is_told(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path, write_byte_level(tmp_path, None))
    stripped = tuple(replace(t, lstrip=True, rstrip=True) if t.text == "<|im_end|>" else t for t in tokenizer.tokens)
    after, before = [each.sentence for each in tokenizer_differences(replace(tokenizer, tokens=stripped))][:2]
    assert "before '<|im_end|>'" in before
    assert "after '<|im_end|>'" in after


def test_metadata_has_the_types_that_llama_cpp_reads(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path, phi3(tmp_path))
    entries = {entry.key.removeprefix("tokenizer."): entry for entry in tokenizer_metadata(tokenizer)}
    assert entries["ggml.scores"].item is GGUFValueType.FLOAT32
    assert entries["ggml.token_type"].item is GGUFValueType.INT32
    assert entries["ggml.padding_token_id"].value == 32000
    assert entries["ggml.add_bos_token"].value is False
    assert entries["ggml.add_space_prefix"].value is True
    assert "ggml.merges" not in entries
    assert "chat_template" not in entries
    assert len(entries["ggml.tokens"].value) == 32064  # type: ignore[arg-type]


def test_byte_level_bpe_with_a_space_prefix_is_refused(tmp_path: Path) -> None:
    tokenizer: Tokenizer = read_tokenizer(tmp_path, write_byte_level(tmp_path, None))
    with pytest.raises(ModelError, match="no space before"):
        tokenizer_metadata(replace(tokenizer, space_prefix=SpacePrefix.ALWAYS))


def test_mistral_common_is_what_these_tests_take_it_for() -> None:
    assert mistral_file("tokenizer.model.v1").stat().st_size == 493443
