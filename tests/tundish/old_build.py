"""A folder that looks as if tundish had built it."""

from __future__ import annotations

import json
from pathlib import Path

from tundish.manifest_file import FORMAT


def old_build(out: Path) -> None:
    (out / "gguf").mkdir(parents=True)
    (out / "gguf" / "model.gguf").write_text("old")
    (out / "report.md").write_text("old")
    manifest = {
        "format": FORMAT,
        "tundish": "0",
        "source": {
            **dict.fromkeys(["repo_id", "revision", "licence", "licence_name", "licence_link"]),
            "name": "m",
            "languages": [],
            "files": {"config.json": "00"},
        },
        "recipe": {"name": "r", "description": "a test"},
        "recipe_digest": "00",
        "context_length": 8,
        "weights": {"w": {"shape": [1], "scheme": "fp32"}},
        "calibration": None,
        "budget": None,
        "libraries": {},
        "targets": {
            "gguf": {
                "semantics": {"sentence": "context 8"},
                "bytes": 3,
                "files": {"model.gguf": {"bytes": 3, "sha256": "00"}},
                "documents": {},
            }
        },
        "verification": None,
        "documents": {},
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
