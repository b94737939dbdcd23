"""Where artifacts come from, in the terms of the supply chain: an in-toto Statement with a SLSA provenance predicate.

Everything in it is in the manifest; it adds the manifest's own digest, and a form that other tools read.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
https://slsa.dev/spec/v1.1/provenance
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tundish.manifest_file import MANIFEST, artifact_files

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "pkg:pypi/tundish#build/v1"  # docs/provenance.md says what its parameters mean

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Digest(BaseModel):
    model_config = ConfigDict(strict=True)
    sha256: _Sha256


class _Subject(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    digest: _Digest


class _Statement(BaseModel):
    """What is relied on of a statement."""

    model_config = ConfigDict(strict=True)
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    predicate_type: Literal["https://slsa.dev/provenance/v1"] = Field(alias="predicateType")
    subject: list[_Subject] = Field(min_length=1)


def statement_bytes(manifest: dict[str, Any], manifest_sha256: str) -> bytes:
    """The statement about a build, as it is written and signed. Same manifest, same bytes."""
    files = {name: record["sha256"] for name, record in artifact_files(manifest).items()}
    files |= {name: record["sha256"] for name, record in manifest["documents"].items()} | {MANIFEST: manifest_sha256}
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"buildDefinition": _definition(manifest), "runDetails": {"builder": _builder(manifest)}},
    }
    return (json.dumps(statement, indent=2, ensure_ascii=False) + "\n").encode()


def subjects(statement: bytes) -> dict[str, str] | None:
    """SHA-256, in hex, of each file that a statement is about, by name; None if it is no such statement."""
    try:
        parsed = _Statement.model_validate(json.loads(statement))
    except (ValidationError, ValueError, RecursionError):
        return None
    return {subject.name: subject.digest.sha256 for subject in parsed.subject}


def _definition(manifest: dict[str, Any]) -> dict[str, Any]:
    source = manifest["source"]
    return {
        "buildType": BUILD_TYPE,
        "externalParameters": {
            "model": {name: source[name] for name in ("name", "repo_id", "revision") if source[name] is not None},
            "recipe": manifest["recipe"],
            "recipe_digest": {"sha256": manifest["recipe_digest"]},
        },
        "resolvedDependencies": [*_source_files(source), *_calibration(manifest["calibration"])],
    }


def _source_files(source: dict[str, Any]) -> list[dict[str, Any]]:
    """The checkpoint's files; those of the Hub with a package URL of type huggingface, which names a commit.

    https://github.com/package-url/purl-spec/blob/main/types-doc/huggingface-definition.md
    """
    origin = f"pkg:huggingface/{source['repo_id']}@{source['revision']}" if source["repo_id"] else None
    return [
        {"name": name}
        | ({"uri": f"{origin}#{quote(name)}"} if origin else {})
        | {"digest": {"sha256": digest}, "annotations": {"role": "checkpoint"}}
        for name, digest in source["files"].items()
    ]


def _calibration(record: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What the quantizer learned from, if there is anything that has a digest: a file, or token ids."""
    digest = record and (record.get("sha256") or record.get("token_ids_sha256"))
    if not record or not digest:
        return []
    name = str(record.get("file") or record.get("text"))
    annotations = {"role": "calibration"} | {name: value for name, value in record.items() if "sha256" not in name}
    return [{"name": name, "digest": {"sha256": digest}, "annotations": annotations}]


def _builder(manifest: dict[str, Any]) -> dict[str, Any]:
    """The tool, and the versions of all that computed, wrote or measured."""
    versions = {"tundish": manifest["tundish"], **manifest["libraries"]}
    for result in (manifest["verification"] or {}).values():
        versions |= result["versions"]
    return {"id": f"pkg:pypi/tundish@{manifest['tundish']}", "version": dict(sorted(versions.items()))}
