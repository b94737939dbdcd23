"""Whether a built folder is what was built: every file's digest, and the signature over them.

The signature covers the provenance, the provenance has the digest of every file but the signature's, the manifest among
them. Without a key, manifest and provenance are held against each other and against the files: chance is found, and
named, but whoever changes a file can change both of them as well.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from converters.errors import GateError, UsageError
from converters.file_digest import reading, sha256_of
from converters.json_file import regular_size
from tundish.holding import holding
from tundish.manifest_file import (
    MANIFEST,
    PROVENANCE,
    SIGNATURE,
    artifact_files,
    drop_unfinished_signature,
    manifest_data,
    parse_manifest,
    read_manifest,
)
from tundish.provenance import statement_bytes, subjects
from tundish.publish import files_in, restore
from tundish.results import meets, verdict
from tundish.signing import key_id, require_envelope, signed_statement

_SHOWN = 5
_MAX_SEAL = 1 << 25  # bytes of a provenance or a signature, which has all of it in base64: twice the most of a manifest
_SAID = {True: "passed", False: "failed", None: "not verified"}


class Signature(Enum):
    """What is known of a build's signature, as a sentence."""

    NONE = "signature: none"
    UNCHECKED = "signature: not checked; give the public key with --key"
    VALID = "signature: valid"


@dataclass(frozen=True, slots=True)
class Intact:
    """A folder whose files all are as they were built: what was read of them, whatever becomes of them.

    `digests`: SHA-256 in hex of each file, by name; `statement`: the bytes of the provenance; `key_id`: of the
    key that signed it, if that was checked.
    """

    manifest: dict[str, Any]
    signature: Signature
    digests: Mapping[str, str]
    statement: bytes
    key_id: str | None = None


@contextmanager
def holding_intact(
    folder: Path, threads: int, say: Callable[[str], None], key: Path | None = None, signing: bool = False
) -> Iterator[Intact]:
    """Hold a build's folder against other commands, or wait for one that does; yields what `require_intact` finds.

    What a command that was killed had left half done in it is put right before; in a signed one only for `signing`,
    which replaces the signature.
    """
    held = folder.resolve()
    with holding(held, say):
        restore(held, say)
        if signing:
            drop_unfinished_signature(held)
        yield require_intact(folder, threads, key)


def require_intact(folder: Path, threads: int, key: Path | None = None) -> Intact:
    """GateError that names what is changed, missing, added or no file of a build's kind, or says that the signature's
    file or the manifest's verdicts cannot be, or if `key`, a public one in a PEM file, is given and did not sign the
    folder. UsageError for a folder that is no build at all, ModelError for what cannot be read."""
    with reading(folder):
        names = files_in(folder) if folder.is_dir() else set()
    if MANIFEST not in names:
        read_manifest(folder)  # says what is wrong
    with reading(folder):
        strays = _strays(folder, names)
    _require(folder, strays)
    if key is not None and SIGNATURE not in names:
        raise GateError(
            "the build is not signed",
            where=str(folder),
            expected=f"{SIGNATURE}, a signature by {key}",
            mend="`tundish sign` signs it.",
        )
    seals = {name: _seal(folder / name) for name in (PROVENANCE, SIGNATURE) if name in names}
    if SIGNATURE in seals:
        require_envelope(seals[SIGNATURE])
    sha256 = sha256_of([folder / name for name in names - {*seals}], threads)
    found = {name: sha256[folder / name] for name in names - {*seals}}
    found |= {name: hashlib.sha256(data).hexdigest() for name, data in seals.items()}
    provenance = seals.get(PROVENANCE, b"")
    if key is not None:
        signed = signed_statement(seals[SIGNATURE], key)
        _require(folder, _differing(found, signed) | ({PROVENANCE} if signed != provenance else set()))
    manifest = _manifest(folder, found, provenance)
    if key is None:
        _require(folder, _disagreeing(found, manifest, provenance))
    _require_consistent(folder, manifest)
    if key is not None:
        return Intact(manifest, Signature.VALID, found, provenance, key_id(key))
    return Intact(manifest, Signature.UNCHECKED if SIGNATURE in seals else Signature.NONE, found, provenance)


def _seal(path: Path) -> bytes:
    """A provenance or a signature, which are held whole; GateError for what is too large to be one."""
    with reading(path):
        size = regular_size(path)
        if size <= _MAX_SEAL:
            return path.read_bytes()
    raise GateError(
        "no file that tundish wrote",
        where=str(path),
        expected=f"at most {_MAX_SEAL:,} bytes",
        found=f"{size:,}",
        mend="The folder was changed or damaged after it was built: build it again.",
    )


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
        name, passed, figure, threshold = (gate[part] for part in ("name", "passed", "figure", "threshold"))
        if figure is not None and threshold is not None and passed is not meets(name, figure, threshold):
            return f"the gate {name} {_SAID[passed]} with {figure} against {threshold}"
    gates = verdict(gate["passed"] for gate in result["gates"])
    if result["passed"] is not gates:
        return f"a verdict of {_SAID[result['passed']]} where the gates come to {_SAID[gates]}"
    return ""


def _differing(found: dict[str, str], statement: bytes) -> set[str]:
    """Files that are not as the statement says, but for those that come after it."""
    return _different(_stated(found), subjects(statement) or {})


def _stated(found: dict[str, str]) -> dict[str, str]:
    """What a statement is about."""
    return {name: digest for name, digest in found.items() if name not in (PROVENANCE, SIGNATURE)}


def _different(found: dict[str, str], recorded: dict[str, str]) -> set[str]:
    return {name for name in {**found, **recorded} if found.get(name) != recorded.get(name)}


def _manifest(folder: Path, found: dict[str, str], provenance: bytes) -> dict[str, Any]:
    """The manifest of the digest that was found."""
    try:
        data = manifest_data(folder)
        _require(folder, {MANIFEST} if hashlib.sha256(data).hexdigest() != found[MANIFEST] else set())
        return parse_manifest(data, folder)
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
    by_manifest = _different({name: found[name] for name in _stated(found) if name != MANIFEST}, recorded)
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
