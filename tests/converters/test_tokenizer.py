"""The record is what transformers makes of the same files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

transformers = pytest.importorskip("transformers")

from converters.config import ModelConfig  # noqa: E402
from converters.errors import ModelError  # noqa: E402
from converters.tokenizer import SpacePrefix, Token, Tokenizer, TokenizerKind, TokenType, read_tokenizer  # noqa: E402
from converters.tokenizer_json import fast_tokenizer  # noqa: E402
from converters.vocabulary import is_filler  # noqa: E402
from exporters.gguf.pretokenizer import identify_pre  # noqa: E402
from tests.converters.tiny_tokenizers import (  # noqa: E402
    LLAMA3,
    O200K,
    byte_level_bpe,
    config,
    gate_texts,
    mistral_file,
    sentencepiece_json,
    write_byte_level,
    write_json,
    write_sentencepiece,
)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    root = json.loads(path.read_text())
    change(root)
    path.write_text(json.dumps(root))


def flags(token: Token | AddedToken) -> tuple[bool, ...]:
    return token.lstrip, token.rstrip, token.single_word, token.normalized


def assert_like_transformers(folder: Path, record: Tokenizer) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    rows = {index: token for index, token in enumerate(record.tokens) if not is_filler(index, token)}
    assert sorted(rows) == sorted(reference.get_vocab().values())
    assert [token.text for token in rows.values()] == reference.convert_ids_to_tokens(list(rows))
    added = {
        index: (token.text, token.type is not TokenType.USER_DEFINED, *flags(token))
        for index, token in rows.items()
        if token.type in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    }
    assert added == {
        index: (token.content, token.special, *flags(token)) for index, token in reference.added_tokens_decoder.items()
    }
    frame = [record.bos_id] * record.add_bos + [record.eos_ids[0]] * record.add_eos
    assert reference("")["input_ids"] == frame
    assert record.bos_id == reference.bos_token_id
    assert record.pad_id == reference.pad_token_id
    assert record.unk_id == reference.unk_token_id
    template = reference.chat_template
    assert record.chat_template == (template["default"] if isinstance(template, dict) else template)


def byte_level(folder: Path) -> ModelConfig:
    return write_byte_level(folder, LLAMA3, ignore_merges=True, add_bos_token=True)


def flags_in_settings(folder: Path) -> ModelConfig:
    """tokenizer_config.json gives a token other flags than tokenizer.json, and has one more."""
    model = write_byte_level(folder, None)
    last = model.vocab_size - 6
    item = {"lstrip": False, "normalized": False, "single_word": False, "special": True}
    rows = {str(last - 2): item | {"content": "<|endoftext|>", "rstrip": True}}
    rows[str(last + 1)] = item | {"content": "<tool>", "rstrip": False, "special": False}
    edit(folder / "tokenizer_config.json", lambda root: root.update(added_tokens_decoder=rows, pad_token="<tool>"))
    return model


def old_layout(folder: Path) -> ModelConfig:
    """Before added_tokens_decoder: added_tokens.json and special_tokens_map.json."""
    model = replace(write_sentencepiece(folder), vocab_size=32010)
    write_json(folder / "added_tokens.json", {"<pad>": 32000, "<extra>": 32001})
    special = {
        name: {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    write_json(folder / "special_tokens_map.json", special | {"pad_token": "<pad>"})
    return model


def named_only(folder: Path) -> ModelConfig:
    """A pad token that no file defines gets the next id."""
    model = write_sentencepiece(folder, pad_token="[PAD]", add_eos_token=True)
    return replace(model, vocab_size=32001)


def class_by_family(folder: Path) -> ModelConfig:
    model = write_sentencepiece(folder)
    write_json(folder / "tokenizer_config.json", {"legacy": False})
    write_json(folder / "config.json", {"model_type": "phi3"})
    return model


def another_family(folder: Path) -> ModelConfig:
    """A family for which transformers does not believe the class that is stated."""
    model = write_sentencepiece(folder, legacy=False, add_bos_token=True)
    write_json(folder / "config.json", {"model_type": "mistral"})
    return replace(model, family="mistral")


def json_and_model(folder: Path) -> ModelConfig:
    model = write_sentencepiece(folder, legacy=False)
    (folder / "tokenizer.json").write_text(sentencepiece_json())
    return model


def templates(folder: Path) -> ModelConfig:
    listed = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "{{ messages }}"}]
    return write_byte_level(folder, None, chat_template=listed)


def template_file(folder: Path) -> ModelConfig:
    model = write_byte_level(folder, None, chat_template="from the settings")
    (folder / "chat_template.jinja").write_text("from the file\n")
    return model


CASES = (
    byte_level,
    flags_in_settings,
    write_sentencepiece,
    lambda folder: write_sentencepiece(folder, phi3=True),
    old_layout,
    named_only,
    class_by_family,
    another_family,
    json_and_model,
    templates,
    template_file,
)


@pytest.mark.parametrize("write", CASES, ids=lambda case: case.__name__)
def test_the_record_is_what_transformers_reads(write: Callable[[Path], ModelConfig], tmp_path: Path) -> None:
    model = write(tmp_path)
    record = read_tokenizer(tmp_path, model)
    assert len(record.tokens) == model.vocab_size
    assert_like_transformers(tmp_path, record)


def named_in_a_list(folder: Path) -> ModelConfig:
    """Special tokens that only a list names: one of the vocabulary's, and one that is nowhere else."""
    return write_byte_level(folder, O200K, extra_special_tokens=["<|endoftext|>", "the", "<|more|>"])


def not_legacy(folder: Path) -> ModelConfig:
    return write_sentencepiece(folder, legacy=False, add_bos_token=True)


RESAVED = (
    byte_level,
    flags_in_settings,
    named_in_a_list,
    not_legacy,
    lambda folder: write_sentencepiece(folder, phi3=True),
    json_and_model,
    templates,
    template_file,
)


@pytest.mark.parametrize("write", RESAVED, ids=lambda case: case.__name__)
def test_what_transformers_saves_anew_gives_the_same_record(
    write: Callable[[Path], ModelConfig], tmp_path: Path
) -> None:
    model = write(tmp_path)
    before = read_tokenizer(tmp_path, model)
    anew = tmp_path / "anew"
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(anew)
    shutil.copy(tmp_path / "config.json", anew)
    after = read_tokenizer(anew, model)
    assert_like_transformers(anew, after)

    def form(record: Tokenizer) -> Tokenizer:
        """Without what the files may say in two ways: merges or the scores that give them."""
        tokens = tuple(replace(token, score=0.0) for token in record.tokens)
        return replace(record, tokens=tokens, merges=(), files={})

    assert form(after) == form(before)
    one, two = fast_tokenizer(before), fast_tokenizer(after)
    for text in gate_texts(before):
        assert two.encode(text).ids == one.encode(text).ids, text


def test_the_post_processor_names_bos_where_there_are_no_settings(tmp_path: Path) -> None:
    model = replace(write_byte_level(tmp_path, LLAMA3), bos_token_id=None)
    (tmp_path / "tokenizer_config.json").unlink()
    edit(tmp_path / "tokenizer.json", frame_of("<|im_start|>"))
    record = read_tokenizer(tmp_path, model)
    assert record.add_bos
    assert record.bos_id is not None
    assert record.tokens[record.bos_id].text == "<|im_start|>"
    assert sum(is_filler(index, token) for index, token in enumerate(record.tokens)) == 5  # nothing is invented


def test_phi3_in_figures(tmp_path: Path) -> None:
    record = read_tokenizer(tmp_path, write_sentencepiece(tmp_path, phi3=True))
    assert record.kind is TokenizerKind.SENTENCEPIECE
    assert record.eos_ids == (32000, 32007, 32001)
    assert (record.bos_id, record.pad_id, record.unk_id, record.add_bos) == (1, 32000, 0, False)
    assert record.tokens[32010].text == "<|user|>"
    assert record.tokens[32010].rstrip
    assert not record.tokens[32000].rstrip
    assert [token.type for token in record.tokens[32011:]] == [TokenType.UNUSED] * 53
    assert record.tokens[3].type is TokenType.BYTE
    assert (record.tokens[261].text, record.tokens[261].score) == ("▁t", -2.0)
    assert set(record.files) == {"tokenizer.model", "tokenizer_config.json"}


def test_scores_of_tokenizer_json_keep_the_order_of_tokenizer_model(tmp_path: Path) -> None:
    model = write_sentencepiece(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/tokenizer.json").write_text(sentencepiece_json())
    one, two = read_tokenizer(tmp_path / "a", model), read_tokenizer(tmp_path / "b", model)
    assert [t.text for t in one.tokens] == [t.text for t in two.tokens]
    assert [t.type for t in one.tokens] == [t.type for t in two.tokens]
    made = {left + right for left, right in two.merges}

    def order(record: Tokenizer) -> list[str]:
        """Tokens that merges make, without the runs of spaces, which SentencePiece gives one and the same score."""
        ranked = sorted(record.tokens, key=lambda token: -token.score)
        return [token.text for token in ranked if token.text in made and token.text.strip("▁")]

    assert len(order(one)) > 28_000
    assert order(one) == order(two)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"legacy": True}, SpacePrefix.ALWAYS),
        ({"legacy": False}, SpacePrefix.FIRST),
        ({"legacy": False, "add_prefix_space": False}, SpacePrefix.NEVER),
        ({}, SpacePrefix.FIRST),
    ],
)
def test_space_prefix_of_a_model_without_tokenizer_json(
    settings: dict[str, object], expected: SpacePrefix, tmp_path: Path
) -> None:
    model = write_sentencepiece(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"} | settings)
    assert read_tokenizer(tmp_path, model).space_prefix is expected
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pieces = reference.tokenize("a</s>b")
    found = {("▁a", "</s>", "▁b"): SpacePrefix.ALWAYS, ("▁a", "</s>", "b"): SpacePrefix.FIRST}
    assert found.get(tuple(pieces), SpacePrefix.NEVER) is expected


def test_merges_in_both_spellings(tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None)
    pairs = read_tokenizer(tmp_path, model).merges
    edit(
        tmp_path / "tokenizer.json",
        lambda root: root["model"].update(merges=[" ".join(pair) for pair in root["model"]["merges"]]),
    )
    assert read_tokenizer(tmp_path, model).merges == pairs
    assert len(pairs[0]) == 2


# ---- what is refused ----


def refusal(folder: Path, model: ModelConfig) -> str:
    with pytest.raises(ModelError) as caught:
        read_tokenizer(folder, model)
    return str(caught.value)


def test_more_tokens_than_vocab_size(tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None)
    message = refusal(tmp_path, replace(model, vocab_size=model.vocab_size - 6))
    assert "does not match the model's vocab_size" in message
    assert "<|im_end|>" in message


def test_no_tokenizer(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {})
    assert "has no tokenizer" in refusal(tmp_path, config(10))


def test_no_end_of_sequence(tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None, eos_token=None)
    assert "no end-of-sequence token" in refusal(tmp_path, replace(model, eos_token_ids=()))


def test_stop_id_outside_the_vocabulary(tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None)
    assert "eos token id is outside" in refusal(tmp_path, replace(model, eos_token_ids=(1, 99999)))


def test_two_tokens_with_one_id(tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None)
    edit(tmp_path / "tokenizer.json", lambda root: root["model"]["vocab"].update(twin=5))
    assert "same id" in refusal(tmp_path, model)


def test_an_added_token_on_anothers_id(tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None)
    row = {"content": "<x>", "lstrip": False, "rstrip": False, "special": True}
    edit(tmp_path / "tokenizer_config.json", lambda root: root.update(added_tokens_decoder={"7": row}))
    assert "the id of another token" in refusal(tmp_path, model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_damaged_json(name: str, text: str, tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None)
    (tmp_path / name).write_text(text)
    assert name in refusal(tmp_path, model)


@pytest.mark.parametrize("cut", [0, 5, 100, 400_000])
def test_damaged_sentencepiece_model(cut: int, tmp_path: Path) -> None:
    model = write_sentencepiece(tmp_path)
    data = mistral_file("tokenizer.model.v1").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[:cut])
    assert "tokenizer.model" in refusal(tmp_path, model)


def test_a_unigram_sentencepiece_model(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("\n".join(f"some words to train on {n} and more of them" for n in range(99)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=38, minloglevel=9
    )
    assert "unigram without byte fallback" in refusal(tmp_path, config(38, (2,)))


def write_fast(folder: Path, tokenizer: FastTokenizer) -> ModelConfig:
    tokenizer.save(str(folder / "tokenizer.json"))
    return config(tokenizer.get_vocab_size(), (0,))


UNSUPPORTED = {
    "Unigram": lambda: FastTokenizer(models.Unigram([("a", 0.0)], 0, False)),
    "WordPiece": lambda: FastTokenizer(models.WordPiece({"a": 0}, unk_token="a")),
    "no byte fallback": lambda: FastTokenizer(models.BPE({"a": 0}, [])),
    "NFC": lambda: byte_fast(normalizer=normalizers.NFC()),
    "Whitespace": lambda: byte_fast(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    ),
    "MergedWithNext": lambda: byte_fast(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex("a"), "merged_with_next"), pre_tokenizers.ByteLevel(False)]
        )
    ),
    "Lowercase": lambda: fallback_fast(normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])),
    "spaces that do not become": lambda: fallback_fast(normalizers.Prepend("▁")),
    "dropout": lambda: FastTokenizer(models.BPE({"a": 0}, [], dropout=0.1)),
}


def byte_fast(**parts: object) -> FastTokenizer:
    tokenizer = FastTokenizer.from_str(byte_level_bpe(None))
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    return tokenizer


def fallback_fast(normalizer: normalizers.Normalizer) -> FastTokenizer:
    tokenizer = FastTokenizer(models.BPE({"<unk>": 0, "<0x00>": 1, "a": 2}, [], byte_fallback=True))
    tokenizer.normalizer = normalizer
    return tokenizer


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_kinds_are_named(name: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, write_fast(tmp_path, UNSUPPORTED[name]()))
    assert "not supported" in message
    assert name in message


def test_several_tokens_in_front(tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None)
    one = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [one, one, {"Sequence": {"id": "A", "type_id": 0}}]}
    edit(tmp_path / "tokenizer.json", lambda root: root.update(post_processor=template))
    assert "several special tokens" in refusal(tmp_path, model)


def test_a_tokenizer_model_of_another_size_does_not_give_its_scores(tmp_path: Path) -> None:
    model = write_sentencepiece(tmp_path)
    fast = FastTokenizer.from_str(sentencepiece_json())
    fast.add_tokens([AddedToken("<more>", normalized=False)])
    fast.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(mistral_file("mistral_instruct_tokenizer_240323.model.v3"), tmp_path / "tokenizer.model")
    record = read_tokenizer(tmp_path, replace(model, vocab_size=32001))
    assert record.tokens[32000].text == "<more>"
    assert record.tokens[260].text == read_tokenizer(tmp_path, replace(model, vocab_size=32001)).tokens[260].text


# File, what replaces parts of its JSON (or its bytes), and words of the message beside the file's name.
DAMAGE: list[tuple[str, dict[str, Any] | bytes, str]] = [
    ("special_tokens_map.json", {"additional_special_tokens": 7}, "additional_special_tokens"),
    ("special_tokens_map.json", {"additional_special_tokens": [{}]}, "malformed added token"),
    ("special_tokens_map.json", {"bos_token": {"content": 7}}, "bos_token"),
    ("special_tokens_map.json", {"eos_token": {}}, "eos_token"),
    ("tokenizer_config.json", {"bos_token": {}}, "bos_token"),
    ("tokenizer_config.json", {"bos_token": ["a"]}, "bos_token"),
    ("tokenizer_config.json", {"bos_token": {"lstrip": True}}, "bos_token"),
    ("tokenizer_config.json", {"bos_token": "\ud800"}, "surrogates not allowed"),
    ("tokenizer_config.json", {"added_tokens_decoder": 7}, "expected an object"),
    ("tokenizer_config.json", {"added_tokens_decoder": []}, "expected an object"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "impossible token id"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "impossible token id"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"3": {}}}, "malformed added token"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": 7}}}, "malformed added token"),
    ("tokenizer_config.json", {"extra_special_tokens": 7}, "extra_special_tokens"),
    ("tokenizer_config.json", {"extra_special_tokens": [7]}, "malformed added token"),
    ("tokenizer_config.json", {"chat_template": [7]}, "chat_template"),
    ("tokenizer_config.json", {"chat_template": [{}]}, "chat_template"),
    ("tokenizer_config.json", {"chat_template": {"a": 1}}, "chat_template"),
    ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": 7}]}, "chat_template"),
    ("tokenizer_config.json", b"[" * 100_000, "nested too deep"),
    ("added_tokens.json", {"zz": "x"}, "impossible token id"),
    ("added_tokens.json", {"zz": None}, "impossible token id"),
    ("added_tokens.json", {"zz": [1]}, "impossible token id"),
    ("chat_template.jinja", b"\xff\xfe\0", "not UTF-8"),
    ("tokenizer.json", b"[" * 100_000, "nested too deep"),
]


@pytest.mark.parametrize(("name", "change", "words"), DAMAGE, ids=range(len(DAMAGE)))
def test_damage_is_named(name: str, change: dict[str, Any] | bytes, words: str, tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None)
    path = tmp_path / name
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        known = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, known | change)
    message = refusal(tmp_path, model)
    assert name in message
    assert words in message


def frame_of(name: object) -> Callable[[dict[str, Any]], object]:
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return lambda root: root.update(post_processor={"type": "TemplateProcessing", "single": single})


def split_by(regex: object) -> Callable[[dict[str, Any]], object]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return lambda root: root["pre_tokenizer"]["pretokenizers"].insert(0, split)


VOCABULARY_DAMAGE: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda root: root["model"].update(vocab={}), "no vocabulary"),
    (lambda root: root["model"].update(merges=[]), "no merges"),
    (lambda root: root["model"].update(merges=[["qqq", "www"]]), "'qqq' in the vocabulary"),
    (lambda root: root["model"].update(merges=[["a", 7]]), "not a pair"),
    (lambda root: root["model"]["vocab"].update(a="x"), "impossible token id"),
    (lambda root: root["model"]["vocab"].update(a=None), "impossible token id"),
    (lambda root: root["model"]["vocab"].update(a=1.5), "impossible token id"),
    (lambda root: root["model"]["vocab"].update({"a\ud800": 2999}), "surrogates not allowed"),
    (lambda root: root["added_tokens"][0].update(content=7), "malformed added token"),
    (lambda root: root["added_tokens"][0].update(content=None), "malformed added token"),
    (lambda root: root["added_tokens"][0].update(id="x"), "impossible token id"),
    (lambda root: root["added_tokens"][0].update(lstrip="x"), "malformed added token"),
    (frame_of(["x"]), "post-processor"),
    (frame_of("<absent>"), "'<absent>'"),
    (split_by(7), "a regex that is no text"),
]


@pytest.mark.parametrize(("change", "words"), VOCABULARY_DAMAGE, ids=range(len(VOCABULARY_DAMAGE)))
def test_a_damaged_vocabulary(change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None)
    edit(tmp_path / "tokenizer.json", change)
    message = refusal(tmp_path, model)
    assert "tokenizer.json" in message
    assert words in message


def test_a_regex_that_does_not_compile(tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None)
    edit(tmp_path / "tokenizer.json", split_by("("))
    with pytest.raises(ModelError, match="regex of the tokenizer is invalid"):
        identify_pre(read_tokenizer(tmp_path, model))


def test_no_additional_special_tokens(tmp_path: Path) -> None:
    model = write_byte_level(tmp_path, None)
    expected = read_tokenizer(tmp_path, model)
    write_json(tmp_path / "special_tokens_map.json", {"additional_special_tokens": None, "pad_token": None})
    assert read_tokenizer(tmp_path, model).tokens == expected.tokens


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff" * 3_000_000, "more than ten bytes"),
        (b"\x0a\x03\x0a\x01a\x12\x04\x1a\x02ab", "a message where a number is expected"),
        (b"\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x7f", "the score nan"),
    ],
)
def test_an_odd_sentencepiece_model(data: bytes, words: str, tmp_path: Path) -> None:
    model = write_sentencepiece(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert words in refusal(tmp_path, model)
