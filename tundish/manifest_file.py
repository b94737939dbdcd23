"""manifest.json on disk: read with suspicion, since whoever has the folder may have edited it; written whole or not."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from converters.errors import ModelError, UsageError
from converters.json_file import read_small
from exporters.base import Target
from tundish.disk import IN_PLACE, disk_errors, drop_unready, finish_replacing, replace_file
from tundish.source_card import CARD

MANIFEST = "manifest.json"
REPORT = "report.md"
PROVENANCE = "provenance.json"
SIGNATURE = "provenance.intoto.jsonl"
PAPERS = frozenset({MANIFEST, REPORT, PROVENANCE, SIGNATURE})  # what lies beside the artifacts
# 1 had digests of whole matrices; 2 has them of their leaves (tundish.digest); 3 says nothing of the machine, and has
# digests of what accompanies the artifacts
FORMAT = 3


_MAX_NBYTES = 1 << 24  # of tens of thousands of matrices, with their budget
_MAX_AXES = 8  # of a tensor; models have four at most


def _plain(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError("a path inside the artifact's folder")
    return name


# Bounded, since numbers are written with separators, and in megabytes: no count is as large, and JSON may spell one.
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _File(_Record):
    bytes: _Count
    sha256: str


_Files = dict[Annotated[str, AfterValidator(_plain)], _File]


class _Semantics(_Record):
    sentence: str


class _Difference(_Record):
    name: str
    of: str
    sentence: str


class _Target(_Record):
    semantics: _Semantics
    differences: list[_Difference] = []  # builds of earlier versions declare none
    bytes: _Count
    files: _Files = Field(min_length=1)
    documents: _Files


class _Weight(_Record):
    shape: list[_Count] = Field(max_length=_MAX_AXES)
    scheme: str
    digest: str | None = None


class _Source(_Record):
    name: str
    repo_id: str | None
    revision: str | None
    licence: str | None
    licence_name: str | None
    licence_link: str | None
    languages: list[str]
    files: dict[str, str] = Field(min_length=1)


class _Recipe(_Record):
    """What is read of a recipe as it stands; tundish.recheck reads all of it."""

    name: str
    description: str


class _Point(_Record):
    """A choice on the front of a budget."""

    nbytes: dict[str, _Count] = Field(min_length=1)
    bits_per_weight: float
    kl: float
    counts: dict[str, _Count]


class _Budget(_Record):
    budget: str
    chosen: _Point
    front: list[_Point]


class _Gate(_Record):
    name: str
    passed: bool | None
    figure: float | None
    threshold: float | None
    detail: str
    declared: dict[str, _Count] = {}


class _Divergence(_Record):
    kl_mean: float | None
    kl_p99: float | None
    top1: float
    perplexity: float | None
    reference_perplexity: float | None
    positions: _Count


class _Result(_Record):
    passed: bool | None
    versions: dict[str, str]
    divergence: _Divergence | None
    answer: str | None
    gates: list[_Gate]


class _Manifest(_Record):
    """What later commands rely on, and what tables, reports and cards show."""

    format: int = Field(ge=FORMAT, le=FORMAT)
    tundish: str
    source: _Source
    recipe: _Recipe
    recipe_digest: str
    context_length: _Count
    weights: dict[str, _Weight] = Field(min_length=1)
    calibration: dict[str, str | int | bool | None] | None
    budget: _Budget | None
    libraries: dict[str, str]
    remarks: list[str] = []
    targets: dict[Annotated[Target, Field(strict=False)], _Target] = Field(min_length=1)
    verification: dict[Annotated[Target, Field(strict=False)], _Result] | None
    documents: _Files


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a build; UsageError if the folder holds none, or one that tundish did not write."""
    return parse_manifest(manifest_data(folder), folder)


def manifest_data(folder: Path) -> bytes:
    """The bytes of a build's manifest; UsageError if the folder holds none."""
    try:
        return read_small(folder / MANIFEST, _MAX_NBYTES)
    except (OSError, ValueError, ModelError) as error:
        raise _no_build(folder, error) from error


def parse_manifest(data: bytes, folder: Path) -> dict[str, Any]:
    """What the bytes of a folder's manifest say; UsageError if tundish did not write them."""
    path = folder / MANIFEST
    try:
        text = data.decode()
    except ValueError as error:
        raise _no_build(folder, error) from error
    try:
        manifest: dict[str, Any] = json.loads(text)
        # What JSON can spell and nobody can write: half of a surrogate pair, and 1e999.
        json.dumps(manifest, ensure_ascii=False, allow_nan=False).encode()
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            "not a manifest that this tundish wrote",
            where=f"{path}: {where}",
            found=first["msg"],
            mend="Build into another folder, or remove this one first if it is an older build.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError("not a manifest that tundish wrote", where=str(path), found=str(error)) from error
    return manifest


def _no_build(folder: Path, error: Exception) -> UsageError:
    return UsageError(
        "not a folder that tundish built", where=str(folder), expected=f"a readable {MANIFEST}", found=str(error)
    )


def artifact_files(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the manifest records of the files in artifact folders ("bytes", "sha256"), by <target>/<name>."""
    return {
        f"{target}/{name}": record
        for target, entry in manifest["targets"].items()
        for name, record in {**entry["files"], **entry["documents"]}.items()
    }


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """A manifest as it is written."""
    return (json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json; an earlier one is never lost."""
    replace_file(folder / MANIFEST, manifest_bytes(manifest))


def finish_papers(folder: Path) -> None:
    """Put right what a process left that was killed while it wrote a build's papers. For whoever holds the folder.

    Nothing in a signed one: papers are written where there is no signature yet, and it comes last, so whatever lies
    beside one is somebody else's.
    """
    if os.path.lexists(folder / SIGNATURE):
        return
    papers = [folder / name for name in PAPERS] + [folder / target / CARD for target in Target]
    with disk_errors(folder, IN_PLACE):
        finish_replacing(papers, folder)


def drop_unfinished_signature(folder: Path) -> None:
    """Remove what a process left that was killed while it replaced a signature. For whoever is about to sign."""
    with disk_errors(folder, IN_PLACE):
        drop_unready(folder / SIGNATURE)
