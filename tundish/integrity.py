"""Whether a built folder is what was built: every file's digest, and the signature over them.

The signature covers the provenance, the provenance has the digest of every file but the signature's, the manifest among
them. Without a key, manifest and provenance are held against each other and against the files: chance is found, and
named, but whoever changes a file can change both of them as well.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from converters.errors import GateError, UsageError
from converters.file_digest import sha256_of
from tundish.manifest_file import MANIFEST, PROVENANCE, SIGNATURE, artifact_files, read_manifest
from tundish.provenance import statement_bytes, subjects
from tundish.publish import files_in
from tundish.results import is_kept
from tundish.signing import require_envelope, signed_statement

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
    """GateError that names what is changed, missing, added or no file of a build's kind, or says that the signature's
    file or the manifest's verdicts cannot be, or if `key`, a public one in a PEM file, is given and did not sign the
    folder. UsageError for a folder that is no build at all."""
    names = files_in(folder) if folder.is_dir() else set()
    if MANIFEST not in names:
        read_manifest(folder)  # says what is wrong
    _require(folder, _strays(folder, names))
    if key is not None and SIGNATURE not in names:
        raise GateError(
            "the build is not signed",
            where=str(folder),
            expected=f"{SIGNATURE}, a signature by {key}",
            mend="`tundish sign` signs it.",
        )
    if SIGNATURE in names:
        require_envelope((folder / SIGNATURE).read_bytes())
    sha256 = sha256_of([folder / name for name in names - {SIGNATURE}], threads)
    found = {name: sha256[folder / name] for name in names - {SIGNATURE}}
    provenance = (folder / PROVENANCE).read_bytes() if PROVENANCE in names else b""
    if key is not None:
        signed = signed_statement((folder / SIGNATURE).read_bytes(), key)
        _require(folder, _differing(found, signed) | ({PROVENANCE} if signed != provenance else set()))
        manifest = read_manifest(folder)
        _require_consistent(folder, manifest)
        return Intact(manifest, Signature.VALID)
    manifest = _manifest(folder, found, provenance)
    _require(folder, _disagreeing(found, manifest, provenance))
    _require_consistent(folder, manifest)
    return Intact(manifest, Signature.UNCHECKED if SIGNATURE in names else Signature.NONE)


def _strays(folder: Path, names: set[str]) -> set[str]:
    """What no build has and no digest tells: links, pipes and the like, which are not read, and folders without files.

    A link to the right bytes would pass, and be another file tomorrow.
    """
    kinds = {name: (folder / name).lstat().st_mode for name in names}
    odd = {f"{name} ({_kind(mode)})" for name, mode in kinds.items() if not stat.S_ISREG(mode)}
    needed = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    paths = [Path(parent, name) for parent, folders, _ in os.walk(folder) for name in folders]
    return odd | {
        f"{name} (a folder without files)"
        for path in paths
        if (name := path.relative_to(folder).as_posix()) not in needed and not path.is_symlink()
    }


def _kind(mode: int) -> str:
    return "a link" if stat.S_ISLNK(mode) else "no regular file"


def _require_consistent(folder: Path, manifest: dict[str, Any]) -> None:
    """GateError if a verdict in the manifest is not what its gates come to, or a gate's not what its figure says."""
    for target, result in (manifest["verification"] or {}).items():
        wrong = _contradiction(result)
        if wrong:
            raise GateError(
                "the manifest is inconsistent",
                where=f"{folder / MANIFEST}: {target}",
                found=wrong,
                mend="`tundish verify` did not write this: build again.",
            )


def _contradiction(result: dict[str, Any]) -> str:
    """What in a target's result cannot be, or nothing. See tundish.results for how verdicts come about."""
    for gate in result["gates"]:
        name, passed, figure, threshold = (gate.get(part) for part in ("name", "passed", "figure", "threshold"))
        if passed is False and result["passed"] is not False:
            return f"a verdict of {_verdict(result['passed'])} where the gate {name} failed"
        numbers = isinstance(figure, (int, float)) and isinstance(threshold, (int, float))
        if passed and numbers and not is_kept(name, figure, threshold):
            return f"the gate {name} passed with {figure} against {threshold}"
    if result["passed"] and not any(gate.get("passed") for gate in result["gates"]):
        return "a verdict of passed where no gate passed"
    return ""


def _verdict(passed: bool | None) -> str:
    return "not verified" if passed is None else "passed"


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
