"""manifest.json: where a build came from, what is in it, and what was measured. No times: same input, same bytes."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from converters.arrays import products
from converters.source import Source, source_files
from exporters.base import Model
from exporters.registry import EXPORTERS
from tundish.manifest_file import FORMAT
from tundish.plan import Plan
from tundish.pour import Poured
from tundish.recipe import Recipe, recipe_digest
from tundish.results import TargetResult
from tundish.source_card import read_source_card
from tundish.worker import package_versions


def build_manifest(
    source: Source,
    read: Mapping[Path, str],
    model: Model,
    recipe: Recipe,
    plan: Plan,
    poured: Poured,
    calibration: Mapping[str, str | int] | None,
) -> dict[str, Any]:
    """The manifest of freshly poured artifacts, not yet verified. Nothing in it depends on the machine.

    `read`: SHA-256 of the source's files, in hex; `calibration`: what the quantizer learned from.
    """
    portable = portable_recipe(recipe)
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
            **_terms(source.folder),
            "files": {name: read[path] for name, path in source_files(source.folder).items()},
        },
        "recipe": portable.model_dump(mode="json", exclude_none=True),
        "recipe_digest": recipe_digest(portable),
        "calibration": None if calibration is None else dict(calibration),
        "computed_by": products().name,
        "budget": plan.assignment and plan.assignment.as_dict(),
        "context_length": model.context_length,
        "libraries": _versions(recipe),
        "dropped": dict(model.graph.dropped),
        **({"remarks": list(plan.remarks)} if plan.remarks else {}),
        "weights": {
            row.name: {"shape": list(row.shape), "scheme": row.scheme}
            | ({"digest": poured.matrices[row.name]} if row.name in poured.matrices else {})
            for row in plan.rows
        },
        "targets": {
            target: {
                "semantics": asdict(plan.semantics[target]),
                "differences": [difference.record() for difference in plan.differences[target]],
                "bytes": layout.nbytes,
                "files": {
                    name: {"bytes": nbytes[target][name], "sha256": digest}
                    for name, digest in sorted(poured.files[target].items())
                },
                "documents": {},
            }
            for target, layout in plan.layouts.items()
        },
        "verification": None,
        "documents": {},
    }


def portable_recipe(recipe: Recipe) -> Recipe:
    """The recipe without the folders of this machine: of a path from the root or from home, the name alone is left."""
    calibration = recipe.calibration
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"source": _portable(recipe.model.source)}),
            "calibration": calibration.model_copy(
                update={"text": _portable(calibration.text), "file": _portable(calibration.file)}
            ),
        }
    )


def _portable(path: str | None) -> str | None:
    if path is None or not (PurePosixPath(path).is_absolute() or PureWindowsPath(path).anchor or path.startswith("~")):
        return path
    return PureWindowsPath(path).name or path  # which takes both kinds of slashes


def _terms(folder: Path) -> dict[str, Any]:
    card = read_source_card(folder)
    return {
        "licence": card.licence,
        "licence_name": card.licence_name,
        "licence_link": card.licence_link,
        "languages": list(card.languages),
    }


def _versions(recipe: Recipe) -> dict[str, str]:
    """Of what computes and writes the artifacts; runtimes are in the record of verification."""
    modules = {module for target in recipe.targets for module in EXPORTERS[target].requires}
    names = {name: version(name) for name in ("gguf", "llvmlite", "numba", "numpy", "safetensors", "tokenizers")}
    names |= package_versions(tuple(sorted(modules)))
    return dict(sorted(names.items())) | {"python": platform.python_version()}


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
