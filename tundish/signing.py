"""Ed25519 signatures of statements, in DSSE envelopes: https://github.com/secure-systems-lab/dsse

securesystemslib and cryptography, which the extra `sign` brings, do it; they are imported when a key is used.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import GateError, UsageError
from tundish.manifest_file import SIGNATURE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
    from securesystemslib.signer import CryptoSigner, SSlibKey

KEY_VARIABLE = "TUNDISH_SIGNING_KEY"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
_ENVELOPE = "a line of JSON with one signature"
_MAKE_KEY = "openssl genpkey -algorithm ed25519 -out key.pem"
_MAKE_PUBLIC = "openssl pkey -in key.pem -pubout -out public.pem"


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key, which nothing prints."""

    key: CryptoSigner = field(repr=False)


def load_signer(file: Path | None) -> Signer | None:
    """The private key in a PEM file, else the one that TUNDISH_SIGNING_KEY has as PEM; None if there is neither.

    UsageError for a key that is none, or no Ed25519 key, or locked by a password. No message shows anything of it.
    """
    text = os.environ.get(KEY_VARIABLE)
    if file is None and not text:
        return None
    _require_library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from securesystemslib.signer import CryptoSigner

    where = KEY_VARIABLE if file is None else str(file)
    key = _private_key((text or "").encode() if file is None else _read(file), where)
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(where, "another kind of key", _MAKE_KEY)
    return Signer(CryptoSigner(key))


def sign(statement: bytes, signer: Signer) -> bytes:
    """The envelope of a statement with its signature: one line of JSON. Same statement and key, same bytes."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(statement, PAYLOAD_TYPE, {})
    envelope.sign(signer.key)
    return _line(envelope.to_dict())


def signed_statement(envelope: bytes, public_key: Path) -> bytes:
    """The statement in an envelope that this key, in a PEM file, has signed.

    GateError if the envelope is damaged or another key's; UsageError for a key that is none. Any changed byte counts
    as damage, even of what a signature does not cover: names, spaces, the unused bits of base64.
    """
    require_envelope(envelope)
    trusted = _trusted(public_key)
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError

    parsed = Envelope.from_dict(json.loads(envelope))
    try:
        parsed.verify([trusted], threshold=1)
    except VerificationError as error:
        signed_by = ", ".join(each[:16] for each in parsed.signatures)
        raise GateError(
            "the build is not signed by this key",
            where=SIGNATURE,
            expected=f"a signature by the key {trusted.keyid[:16]} ({public_key})",
            found=f"one by {signed_by}, or a damaged one",
            mend="Ask whoever built it for their public key. If this is it, do not trust the build.",
        ) from error
    payload: bytes = parsed.payload
    return payload


def key_id(public_key: Path) -> str:
    """What signatures call the key in a PEM file. UsageError for a key that is none."""
    return str(_trusted(public_key).keyid)


def _trusted(public_key: Path) -> SSlibKey:
    _require_library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from securesystemslib.signer import SSlibKey

    key = _public_key(_read(public_key), str(public_key))
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(str(public_key), "another kind of key", _MAKE_PUBLIC)
    return SSlibKey.from_crypto(key)


def require_envelope(envelope: bytes) -> None:
    """GateError unless these are the bytes of an envelope as `sign` writes it, with one signature and nothing besides.

    Who signed is not looked at, which needs neither key nor library.
    """
    try:
        parsed = json.loads(envelope)
        signature = parsed["signatures"][0]
        written = {
            "payload": _base64(parsed["payload"]),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": bytes.fromhex(signature["keyid"]).hex(), "sig": _base64(signature["sig"])}],
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # whatever stands there
        raise _no_signature("no envelope that tundish wrote", _ENVELOPE) from error
    if _line(written) != envelope:
        raise _no_signature("no envelope that tundish wrote", _ENVELOPE)


def _base64(text: str) -> str:
    """The one spelling of what a text in base64 says."""
    return base64.b64encode(base64.b64decode(text)).decode()


def _line(envelope: Mapping[str, object]) -> bytes:
    return json.dumps(envelope, separators=(",", ":")).encode() + b"\n"


def _private_key(pem: bytes, where: str) -> PrivateKeyTypes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise _no_key(where, "a key that is locked by a password", "openssl pkey -in key.pem -out open.pem") from error
    except (ValueError, UnsupportedAlgorithm):
        raise _no_key(where, "no private key that can be read", _MAKE_KEY) from None  # the cause may quote the file


def _public_key(pem: bytes, where: str) -> PublicKeyTypes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        found = "a private key, which is nothing to hand on" if b"PRIVATE" in pem else "no public key that can be read"
        raise _no_key(where, found, _MAKE_PUBLIC) from None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError("cannot read the key", where=str(file), found=error.strerror or str(error)) from error


def _require_library() -> None:
    try:
        import cryptography  # noqa: F401
        import securesystemslib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "signatures need securesystemslib and cryptography",
            found=f"no {error.name}",
            mend="Install the extra: pip install 'tundish[sign]'.",
        ) from error


def _no_key(where: str, found: str, command: str) -> UsageError:
    return UsageError(
        "no key for signatures", where=where, expected="an Ed25519 key in PEM", found=found, mend=f"Try: {command}"
    )


def _no_signature(found: str, expected: str) -> GateError:
    return GateError(
        "the signature does not hold",
        where=SIGNATURE,
        expected=expected,
        found=found,
        mend="The file is damaged, or signed with another key: remove it and sign again.",
    )
