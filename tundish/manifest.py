"""manifest.json: where a build came from, what is in it, and what was measured. No times: same input, same bytes."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.source import Source, source_files
from exporters.base import Model
from tundish.manifest_file import FORMAT
from tundish.model import SAMPLE
from tundish.plan import Plan
from tundish.pour import Poured
from tundish.recipe import Recipe, recipe_digest
from tundish.verify import TargetResult


def build_manifest(
    source: Source,
    read: Mapping[Path, str],
    model: Model,
    recipe: Recipe,
    plan: Plan,
    poured: Poured,
    calibration: Mapping[str, str | int] | None,
) -> dict[str, Any]:
    """The manifest of freshly poured artifacts, not yet verified. `read`: SHA-256 of the source's files, in hex;
    `calibration`: what the quantizer learned from."""
    nbytes = {
        target: {name: file.nbytes for name, file in layout.big.items()}
        | {name: len(data) for name, data in layout.small.items()}
        for target, layout in plan.layouts.items()
    }
    return {
        "format": FORMAT,
        "tundish": version("tundish"),
        "source": {
            "name": source.name,
            "repo_id": source.repo_id,
            "revision": source.revision,
            # Where a local checkpoint lies, for `tundish verify`; Hub ids and the sample are found again by name.
            "folder": None if source.repo_id or source.name == SAMPLE else str(source.folder),
            "licence": model.licence,
            "files": {name: read[path] for name, path in source_files(source.folder).items()},
        },
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "recipe_digest": recipe_digest(recipe),
        "calibration": None if calibration is None else dict(calibration),
        "budget": plan.assignment and plan.assignment.as_dict(),
        "context_length": model.context_length,
        "libraries": {name: version(name) for name in ("numpy", "numba", "gguf", "tokenizers")}
        | {"python": platform.python_version()},
        "dropped": dict(model.graph.dropped),
        "weights": {
            row.name: {"shape": list(row.shape), "scheme": row.scheme}
            | ({"digest": poured.matrices[row.name]} if row.name in poured.matrices else {})
            for row in plan.rows
        },
        "targets": {
            target: {
                "semantics": asdict(plan.semantics[target]),
                "bytes": layout.nbytes,
                "files": {
                    name: {"bytes": nbytes[target][name], "sha256": digest}
                    for name, digest in sorted(poured.files[target].items())
                },
            }
            for target, layout in plan.layouts.items()
        },
        "verification": None,
    }


def verification_record(results: Sequence[TargetResult]) -> dict[str, Any]:
    """The gates of every target, as JSON holds them."""
    return {
        result.target: {
            "passed": result.passed,
            "versions": dict(result.versions),
            "divergence": None if result.divergence is None else asdict(result.divergence),
            "answer": result.answer,
            "gates": [asdict(gate) for gate in result.gates],
        }
        for result in results
    }
