"""What accompanies artifacts: licences, cards, report, manifest, provenance, signature.

Each has the digests of those before it, so that a signature of the last covers everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters.errors import GateError, UsageError
from exporters.base import Target
from exporters.registry import EXPORTERS
from tundish.cards import model_card
from tundish.disk import IN_PLACE, disk_errors, replace_file, replace_files
from tundish.integrity import holding_intact
from tundish.manifest_file import MANIFEST, PROVENANCE, REPORT, SIGNATURE, manifest_bytes
from tundish.provenance import statement_bytes
from tundish.report import write_report
from tundish.signing import KEY_VARIABLE, Signer, load_signer, sign
from tundish.source_card import CARD
from tundish.watcher import SILENT, Watcher


def write_licences(folder: Path, manifest: dict[str, Any], licences: Mapping[str, bytes]) -> None:
    """Put the checkpoint's licence into every artifact folder, and its digests into the manifest."""
    for target, entry in manifest["targets"].items():
        own = {name: data for name, data in licences.items() if name not in entry["files"]}
        replace_files({folder / target / name: data for name, data in own.items()})
        entry["documents"] |= {name: _record(data) for name, data in own.items()}


def write_papers(folder: Path, manifest: dict[str, Any], signer: Signer | None) -> None:
    """Write cards, report, manifest, provenance and, given a key, the signature.

    The manifest gets the digests of those before it. An earlier signature is removed, since it is of other papers.
    """
    papers: dict[str, bytes] = {}
    for target, entry in manifest["targets"].items():
        card = model_card(manifest, target, EXPORTERS[Target(target)].card).encode()
        papers[f"{target}/{CARD}"] = card
        entry["documents"] = dict(sorted({**entry["documents"], CARD: _record(card)}.items()))
    papers[REPORT] = write_report(manifest).encode()
    manifest["documents"] = {REPORT: _record(papers[REPORT])}
    papers[MANIFEST] = manifest_bytes(manifest)
    papers[PROVENANCE] = statement_bytes(manifest, hashlib.sha256(papers[MANIFEST]).hexdigest())
    if signer is not None:
        papers[SIGNATURE] = sign(papers[PROVENANCE], signer)
    (folder / SIGNATURE).unlink(missing_ok=True)
    replace_files({folder / name: data for name, data in papers.items()}, together=folder)


def sign_build(folder: Path, key: Path | None, threads: int, watcher: Watcher = SILENT) -> Path:
    """Sign a folder that is as it was built, with a private key in a PEM file or the environment's.

    Returns the signature's file. GateError if the folder was changed, or missed a gate; UsageError without a key.
    """
    signer = load_signer(key)
    if signer is None:
        raise UsageError("no key to sign with", mend=f"Give one with --key, or as PEM in {KEY_VARIABLE}.")
    sign_folder(folder, signer, threads, watcher.say)
    return folder / SIGNATURE


def sign_folder(
    folder: Path, signer: Signer, threads: int, say: Callable[[str], None], expected: Mapping[str, Any] | None = None
) -> None:
    """The same with a key that was loaded. GateError too if the manifest is not the one `expected`."""
    with holding_intact(folder, threads, say, signing=True) as intact:
        if expected is not None and intact.manifest != expected:
            raise GateError("another build took the place of the one to sign", where=str(folder), mend="Build again.")
        results = intact.manifest["verification"] or {}
        failed = [target for target, result in results.items() if result["passed"] is False]
        if failed:
            raise GateError("the build missed its gates", where=str(folder), found=", ".join(failed))
        with disk_errors(folder, IN_PLACE):
            replace_file(folder / SIGNATURE, sign(intact.statement, signer))
    unmeasured = [target for target in intact.manifest["targets"] if results.get(target, {}).get("passed") is None]
    if unmeasured:
        say(f"warning: what is signed was not verified: {', '.join(unmeasured)}")


def _record(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
