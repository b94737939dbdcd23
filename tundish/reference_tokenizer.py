"""Token ids by transformers' own tokenizer, in a process of its own.

python -m tundish.reference_tokenizer FOLDER TEXTS.json IDS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tundish.child import exit_with_parent


def main(folder: str, texts: str, result: str) -> None:
    """Read a JSON list of texts, write a JSON list of id lists: special tokens recognized, BOS added as usual."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    ids = [tokenizer(text)["input_ids"] for text in json.loads(Path(texts).read_text(encoding="utf-8"))]
    Path(result).write_text(json.dumps(ids), encoding="utf-8")


if __name__ == "__main__":
    exit_with_parent()
    main(*sys.argv[1:])
