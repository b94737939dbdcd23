"""Token ids and texts by transformers' own tokenizer, in a process of its own.

python -m tundish.reference_tokenizer FOLDER TEXTS.json RESULT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tundish.child import exit_with_parent


def main(folder: str, texts: str, result: str) -> None:
    """Read a JSON list of texts; write their ids (special tokens recognized, BOS added as usual), and the texts that
    these ids are decoded into (without special tokens)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    ids = tokenizer(json.loads(Path(texts).read_text(encoding="utf-8")))["input_ids"]
    decoded = [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
    Path(result).write_text(json.dumps({"ids": ids, "decoded": decoded}), encoding="utf-8")


if __name__ == "__main__":
    exit_with_parent()
    main(*sys.argv[1:])
