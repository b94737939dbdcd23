"""Keys for signatures."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

PKCS8 = (Encoding.PEM, PrivateFormat.PKCS8)


def write_keys(folder: Path, name: str) -> Path:
    """A new key in <name>.pem, and its public half in <name>.pub."""
    private = Ed25519PrivateKey.generate()
    (folder / f"{name}.pem").write_bytes(private.private_bytes(*PKCS8, NoEncryption()))
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / f"{name}.pem"
