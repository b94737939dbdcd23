"""manifest.json on disk: read with suspicion, since whoever has the folder may have edited it; written whole or not."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from converters.errors import UsageError
from exporters.base import Target

MANIFEST = "manifest.json"
REPORT = "report.md"
FORMAT = 2  # 1 had digests of whole matrices; 2 has them of their leaves (tundish.digest)


def _plain(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError("a path inside the artifact's folder")
    return name


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _File(_Record):
    bytes: int
    sha256: str


class _Target(_Record):
    files: dict[Annotated[str, AfterValidator(_plain)], _File] = Field(min_length=1)


class _Weight(_Record):
    shape: list[int]
    scheme: str
    digest: str | None = None


class _Source(_Record):
    name: str
    folder: str | None
    repo_id: str | None
    revision: str | None
    files: dict[str, str] = Field(min_length=1)


class _Manifest(_Record):
    """What later commands rely on."""

    format: int = Field(ge=FORMAT, le=FORMAT)
    tundish: str
    source: _Source
    recipe: dict[str, Any]
    recipe_digest: str
    weights: dict[str, _Weight] = Field(min_length=1)
    targets: dict[Annotated[Target, Field(strict=False)], _Target] = Field(min_length=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a build; UsageError if the folder holds none, or one that tundish did not write."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            "not a folder that tundish built", where=str(folder), expected=f"a readable {MANIFEST}", found=str(error)
        ) from error
    try:
        manifest: dict[str, Any] = json.loads(text)
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


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json by way of a temporary file, so that an earlier one is never lost."""
    temporary = folder / (MANIFEST + ".new")
    temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)
