"""Whether a built folder is what was built: every file's digest, and the signature over them.

The signature covers the provenance, the provenance has the digest of every file but the signature's, the manifest among
them. Without a key, manifest and provenance are held against each other and against the files: chance is found, and
named, but whoever changes a file can change both of them as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from converters.errors import GateError, UsageError
from converters.file_digest import sha256_of
from tundish.manifest_file import MANIFEST, PROVENANCE, SIGNATURE, artifact_files, read_manifest
from tundish.provenance import statement_bytes, subjects
from tundish.publish import files_in
from tundish.signing import signed_statement

_SHOWN = 5


class Signature(Enum):
    """What is known of a build's signature, as a sentence."""

    NONE = "signature: none"
    UNCHECKED = "signature: not checked; give the public key with --key"
    VALID = "signature: valid"


@dataclass(frozen=True, slots=True)
class Intact:
    """A folder whose files all are as they were built."""

    manifest: dict[str, Any]
    signature: Signature


def require_intact(folder: Path, threads: int, key: Path | None = None) -> Intact:
    """GateError that names the files that are changed, missing or added, or if `key`, a public one in a PEM file, is
    given and did not sign the folder. UsageError for a folder that is no build at all."""
    names = files_in(folder) if folder.is_dir() else set()
    if MANIFEST not in names:
        read_manifest(folder)  # says what is wrong
    if key is not None and SIGNATURE not in names:
        raise GateError(
            "the build is not signed",
            where=str(folder),
            expected=f"{SIGNATURE}, a signature by {key}",
            mend="`tundish sign` signs it.",
        )
    present = {name: folder / name for name in names - {SIGNATURE} if (folder / name).is_file()}
    sha256 = sha256_of(present.values(), threads)
    found = {name: sha256.get(present[name], "") if name in present else "" for name in names - {SIGNATURE}}
    provenance = (folder / PROVENANCE).read_bytes() if PROVENANCE in present else b""
    if key is not None:
        signed = signed_statement((folder / SIGNATURE).read_bytes(), key)
        _require(folder, _differing(found, signed) | ({PROVENANCE} if signed != provenance else set()))
        return Intact(read_manifest(folder), Signature.VALID)
    manifest = _manifest(folder, found, provenance)
    _require(folder, _disagreeing(found, manifest, provenance))
    return Intact(manifest, Signature.UNCHECKED if SIGNATURE in names else Signature.NONE)


def _differing(found: dict[str, str], statement: bytes) -> set[str]:
    """Files but the provenance that are not as the statement says."""
    return _different({name: digest for name, digest in found.items() if name != PROVENANCE}, subjects(statement) or {})


def _different(found: dict[str, str], recorded: dict[str, str]) -> set[str]:
    return {name for name in {**found, **recorded} if found.get(name) != recorded.get(name)}


def _manifest(folder: Path, found: dict[str, str], provenance: bytes) -> dict[str, Any]:
    try:
        return read_manifest(folder)
    except UsageError:
        if (subjects(provenance) or {}).get(MANIFEST, found[MANIFEST]) != found[MANIFEST]:
            _require(folder, {MANIFEST})  # a build's, and damaged since
        raise


def _disagreeing(found: dict[str, str], manifest: dict[str, Any], provenance: bytes) -> set[str]:
    """What is changed, if there is no signature to trust: one of the manifest and the provenance may be."""
    said = subjects(provenance)
    recorded = {
        name: record["sha256"] for name, record in {**artifact_files(manifest), **manifest["documents"]}.items()
    }
    by_manifest = _different({name: found[name] for name in found if name not in (MANIFEST, PROVENANCE)}, recorded)
    if said is None or said.get(MANIFEST) == found[MANIFEST]:  # nobody guesses the digest of a changed manifest
        agreed = provenance == statement_bytes(manifest, found[MANIFEST])
        return by_manifest if agreed else by_manifest | {PROVENANCE}
    if provenance == statement_bytes(manifest, said.get(MANIFEST, "")):
        # Either the manifest is changed in something that the provenance does not repeat, or its digest there is.
        return by_manifest | {f"{MANIFEST} (or what {PROVENANCE} says of it)"}
    return _differing(found, provenance) | {MANIFEST}


def _require(folder: Path, damaged: set[str]) -> None:
    if damaged:
        listed = sorted(damaged)
        raise GateError(
            "files differ from the manifest",
            where=str(folder),
            found=", ".join(listed[:_SHOWN]) + (" …" if len(listed) > _SHOWN else ""),
            mend="The folder was changed or damaged after it was built: build it again.",
        )
