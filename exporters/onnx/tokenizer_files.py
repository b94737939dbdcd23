"""The tokenizer as onnxruntime-genai reads it, which takes onnxruntime-extensions for the work.

The checkpoint's own files stay what they are wherever that reader does with them what transformers does. It differs in
four points (operators/tokenizer of microsoft/onnxruntime-extensions), and the folder is made to suit it:

1. A pre-tokenizer's steps count only if they are Split with a Regex; the rest (Digits, ByteLevel's own regex) is left
   out. tokenizer.json then spells the same steps as Splits. Alternatives that it knows by heart it matches with code
   of its own, and where white space goes on after a line end, that code takes more than LINE_ENDS would: RUNS spells
   these in a way that it does not know and gives to std::regex.
2. SentencePiece text is cut by Llama 3's regex before merging, contractions and all, unless tokenizer.json has one
   Split as its whole pre-tokenizer. It then names WORDS, and tokenizer_module.json, which overrides
   tokenizer_config.json for this reader alone, a class that is cut by it. (Gemma's class would be cut in front of
   every CR, inside pieces such as ",\\r".)
3. tokenizer.model is not read: tokenizer.json is made from the vocabulary.
4. A space at the start of the text only (Metaspace's scheme "first") comes out after each added token too, and a
   decoder that strips a space is enough to bring it about. Chat prompts start with an added token, and then the model
   wants no space: the folder asks for none, and plain text loses its first space.
"""

from __future__ import annotations

import json

from converters.chat_template import for_exact_reader, variables
from converters.tokenizer import SpacePrefix, Tokenizer, TokenizerKind, TokenType
from exporters.transformers_files import CONFIG, with_template

SPACE = "\u2581"
TOKENIZER_JSON = "tokenizer.json"
MODULE = "tokenizer_module.json"
RAW_TOOLS = "tool.function"  # TokenizerImpl::ApplyChatTemplate looks for it

# Classes that onnxruntime-extensions knows. Nothing but points 1 and 2 depends on them.
CLASSES = {TokenizerKind.SENTENCEPIECE: "LlamaTokenizer", TokenizerKind.BYTE_LEVEL_BPE: "PreTrainedTokenizer"}

# Longest word in characters: std::regex, which onnxruntime-extensions matches WORDS with, takes stack for each one, and
# a thread may have as little as 512 KiB.
LONGEST_WORD = 400
_SPACES = rf"(?: |{SPACE})"
_CHARACTER = rf"(?:[^ \x80-\xff]|(?!{SPACE})[^\x01-\x7f\x80-\xbf][\x80-\xbf]*)"  # the regex sees UTF-8's bytes
# A word with the spaces in front of it. No piece of a vocabulary that was trained word by word goes beyond.
WORDS = rf"{_SPACES}{{0,{LONGEST_WORD}}}{_CHARACTER}{{1,{LONGEST_WORD}}}|{_SPACES}{{1,{LONGEST_WORD}}}"

LINE_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"  # the last alternatives of Llama 3's regex and those made after it
_ASCII = r"[\t-\r ]"
_WIDE = (
    "(?:"
    + "|".join(map(chr, (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)))
    + ")"
)
_WHITE = f"(?:{_ASCII}|{_WIDE})"
LONGEST_MIXED_RUN = 12  # of white space that is not all ASCII: std::regex unrolls the alternatives as many times
_RUN, _MIXED = f"{{0,{LONGEST_WORD}}}", f"{{0,{LONGEST_MIXED_RUN}}}"
_AT_WORD = rf"(?!{_WHITE})[\s\S]"
# White space as LINE_ENDS takes it: up to its last line end; else up to the last character before a word; else all.
RUNS = "|".join(
    (
        rf"{_ASCII}{_RUN}[\r\n](?!{_WHITE}{_MIXED}[\r\n])",
        rf"{_WHITE}{_MIXED}[\r\n]",
        rf"{_ASCII}{_ASCII}{_RUN}(?!{_ASCII}{_RUN}{_WIDE})(?!{_AT_WORD})",
        rf"{_WHITE}{_WHITE}{_MIXED}(?!{_AT_WORD})",
        _WHITE,
    )
)

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name -> content."""
    files = {name: path.read_bytes() for name, path in tokenizer.files.items()}
    if TOKENIZER_JSON in files:
        document = json.loads(files[TOKENIZER_JSON])
        adapted = adapt(document, tokenizer)
        if adapted != document:
            files[TOKENIZER_JSON] = _dump(adapted)
    else:
        files[TOKENIZER_JSON] = _dump(sentencepiece_json(tokenizer))
    module = module_json(tokenizer)
    files.setdefault(CONFIG, _dump(module))
    files[MODULE] = _dump(module)
    if tokenizer.chat_template is not None:
        return with_template(files, chat_template(tokenizer.chat_template))
    return files


def chat_template(template: str) -> str:
    """The template as this reader takes it: it trims nothing around blocks, which the folder's template then does not
    ask for. Tools come to it in another form than they were given, unless these letters are in the template."""
    adapted = for_exact_reader(template)
    return adapted if "tools" not in variables(adapted) or RAW_TOOLS in adapted else f"{{# {RAW_TOOLS} #}}{adapted}"


def module_json(tokenizer: Tokenizer) -> dict[str, Json]:
    """tokenizer_module.json: the class, and which special tokens frame a text."""
    module: dict[str, Json] = {
        "tokenizer_class": CLASSES[tokenizer.kind],
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
    }
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_ids[0] if tokenizer.eos_ids else None,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
    }
    return module | {key: tokenizer.tokens[index].text for key, index in ids.items() if index is not None}


def adapt(document: dict[str, Json], tokenizer: Tokenizer) -> dict[str, Json]:
    """tokenizer.json with the same meaning in steps that onnxruntime-extensions takes."""
    adapted = dict(document)
    patterns = [_with_runs(pattern) for pattern in tokenizer.split_patterns]
    if tokenizer.kind is TokenizerKind.BYTE_LEVEL_BPE and (
        patterns != list(tokenizer.split_patterns) or not _has_only_splits(document.get("pre_tokenizer"))
    ):
        adapted["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*map(_split, patterns), _byte_level()]}
    if tokenizer.kind is TokenizerKind.SENTENCEPIECE:
        adapted |= _sentencepiece_steps(tokenizer)
    if not tokenizer.add_bos:
        adapted["post_processor"] = _without_frame(document.get("post_processor"))
    return adapted


def _with_runs(pattern: str) -> str:
    """The same split, with the white space at line ends matched right."""
    return pattern.removesuffix(LINE_ENDS) + RUNS if pattern.endswith(f"|{LINE_ENDS}") else pattern


def _has_only_splits(step: Json) -> bool:
    """Whether this is Splits by Regex, and a ByteLevel that splits nothing itself."""
    if not isinstance(step, dict) or not isinstance(step.get("pretokenizers"), list):
        return False
    steps = step["pretokenizers"]
    assert isinstance(steps, list)
    return all(
        isinstance(each, dict)
        and (
            (each.get("type") == "Split" and isinstance(each.get("pattern"), dict) and "Regex" in str(each["pattern"]))
            or (each.get("type") == "ByteLevel" and each.get("use_regex") is False)
        )
        for each in steps
    )


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level() -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _words() -> Json:
    """A Split that onnxruntime-extensions alone acts on: the tokenizers library puts Contiguous matches together, and
    the last way to match leaves no gap between them."""
    pattern: Json = {"Regex": rf"{WORDS}|[\s\S]"}
    return {"type": "Split", "pattern": pattern, "behavior": "Contiguous", "invert": False}


def _underlines() -> Json:
    return {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _decoder(strip: bool) -> Json:
    """Pieces to text; `strip` takes away the space that encoding put in front."""
    spaces: Json = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    first: list[Json] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if strip else []
    return {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *first]}


def _without_frame(processor: Json) -> Json:
    """The post-processor, unless it is a template: that reader adds BOS where a template names it, asked for or not."""
    if isinstance(processor, dict) and "TemplateProcessing" in json.dumps(processor):
        return None
    return processor


def sentencepiece_json(tokenizer: Tokenizer) -> dict[str, Json]:
    """tokenizer.json of a SentencePiece BPE vocabulary.

    Merges follow from the scores: every way to cut a piece in two pieces is one, in the order of the pieces' scores.
    """
    assert tokenizer.kind is TokenizerKind.SENTENCEPIECE
    document: dict[str, Json] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer),
        "post_processor": None,
        "model": _sentencepiece_model(tokenizer),
    }
    return document | _sentencepiece_steps(tokenizer)


def _sentencepiece_steps(tokenizer: Tokenizer) -> dict[str, Json]:
    """What happens to a text before and after the merges."""
    always = tokenizer.space_prefix is SpacePrefix.ALWAYS
    prefix: list[Json] = [{"type": "Prepend", "prepend": SPACE}] if always else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, _underlines()]},
        "pre_tokenizer": _words(),
        "decoder": _decoder(strip=always),
    }


def _sentencepiece_model(tokenizer: Tokenizer) -> Json:
    used = [(token.text, index) for index, token in enumerate(tokenizer.tokens) if token.type is not TokenType.UNUSED]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if tokenizer.unk_id is None else tokenizer.tokens[tokenizer.unk_id].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": dict(used),
        "merges": [[left, right] for left, right in merges_of_scores(tokenizer)],
    }


def merges_of_scores(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece: best score first, then longest left part, as transformers does."""
    ids = {token.text: index for index, token in enumerate(tokenizer.tokens) if token.type is TokenType.NORMAL}
    cuts = ((text, cut) for text in ids for cut in range(1, len(text)))
    pairs = ((text[:cut], text[cut:]) for text, cut in cuts if text[:cut] in ids and text[cut:] in ids)
    scores = {text: tokenizer.tokens[index].score for text, index in ids.items()}
    return sorted(pairs, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0])))


def _added_tokens(tokenizer: Tokenizer) -> Json:
    kinds = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    return [
        {
            "id": index,
            "content": token.text,
            "single_word": False,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": False,
            "special": token.type is not TokenType.USER_DEFINED,
        }
        for index, token in enumerate(tokenizer.tokens)
        if token.type in kinds
    ]


def _dump(document: dict[str, Json]) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode()
