"""Digests and signatures of a build: whatever is changed is found and named, and others can check what is signed."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    NoEncryption,
    load_pem_private_key,
)
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

from converters.errors import GateError, ModelError, UsageError
from converters.file_digest import sha256_of
from tests.tundish.keys import PKCS8, write_keys
from tundish import chat_renderer, matrix_worker
from tundish.child import run_child
from tundish.cli import verify
from tundish.integrity import Signature, require_intact
from tundish.manifest_file import MANIFEST, PROVENANCE, SIGNATURE, read_manifest
from tundish.papers import sign_build, write_papers
from tundish.signing import KEY_VARIABLE, key_id, load_signer


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_keys(tmp_path, "key")


@pytest.fixture
def signed(poured: Path, key: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "signed"
    shutil.copytree(poured, folder)
    sign_build(folder, key, 1)
    return folder


def public(key: Path) -> Path:
    return key.with_suffix(".pub")


def flips(folder: Path, count: int, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Change a byte in each of `count` random places, one after the other: place -> what is said if that is not that
    this file, and no other, is damaged."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in leave_out)
    random = np.random.default_rng(5)
    missed, doubtful = {}, 0
    for index in range(count):
        path = files[index % len(files)]
        data = path.read_bytes()
        at, change = int(random.integers(len(data))), int(random.integers(1, 256))
        path.write_bytes(data[:at] + bytes([data[at] ^ change]) + data[at + 1 :])
        name = path.relative_to(folder).as_posix()
        said = "nothing"
        try:
            require_intact(folder, 1, None if leave_out else folder.parent / "key.pub")
        except GateError as error:
            said = str(error)
        found = SIGNATURE if SIGNATURE in said else said.partition("; found ")[2].partition(". The folder")[0]
        if found != name and found != f"{MANIFEST} (or what {PROVENANCE} says of it)":
            missed[f"{name}, byte {at} ^ {change}"] = said
        doubtful += found != name
        path.write_bytes(data)
    assert doubtful <= (count / 10 if leave_out else 0)
    return missed


def test_every_changed_byte_is_found_and_its_file_named(signed: Path, key: Path) -> None:
    assert require_intact(signed, 2, public(key)).signature is Signature.VALID
    assert not flips(signed, 200)
    assert require_intact(signed, 2, public(key)).signature is Signature.VALID


def test_so_it_is_without_a_key_but_for_the_signature_itself(signed: Path) -> None:
    assert require_intact(signed, 2).signature is Signature.UNCHECKED
    assert not flips(signed, 100, (SIGNATURE,))


def test_no_byte_of_the_papers_may_change(signed: Path, key: Path) -> None:
    """Each byte of the signature's file, and a bit each: what base64, JSON and names leave free as well."""
    path = signed / SIGNATURE
    data = path.read_bytes()
    begin = data.index(b'"sig"') - 120  # the payload, which is the provenance, is before
    for at in [*range(40), *range(begin, len(data))]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(GateError, match=SIGNATURE):
            require_intact(signed, 1, public(key))


CHANGES: dict[str, Callable[[Path], object]] = {
    "gguf/Modelfile": lambda folder: (folder / "gguf" / "Modelfile").unlink(),
    "onnx/added.py": lambda folder: (folder / "onnx" / "added.py").write_text("import os"),
    "mlx/README.md": lambda folder: shutil.copy(folder / "gguf" / "README.md", folder / "mlx" / "README.md"),
    "report.md": lambda folder: (folder / "report.md").unlink(),
    PROVENANCE: lambda folder: (folder / PROVENANCE).unlink(),
    MANIFEST: lambda folder: (folder / MANIFEST).write_text("{}"),
    "mlx/link": lambda folder: (folder / "mlx" / "link").symlink_to("nowhere"),
    "mlx/empty": lambda folder: (folder / "mlx" / "empty").mkdir(),
    "extra": lambda folder: (folder / "extra" / "in" / "it").mkdir(parents=True),
    "mlx/folder": lambda folder: (folder / "mlx" / "folder").symlink_to(folder / "gguf"),
    "gguf": lambda folder: by_link(folder / "gguf"),
    "gguf/model.gguf": lambda folder: by_link(folder / "gguf" / "model.gguf"),
    SIGNATURE: lambda folder: by_pipe(folder / SIGNATURE),
    "onnx/README.md": lambda folder: by_pipe(folder / "onnx" / "README.md"),
}


def by_link(path: Path) -> None:
    """The same bytes, by way of a link."""
    build = next(folder for folder in path.parents if (folder / MANIFEST).exists())
    path.symlink_to(path.rename(build.parent / "moved"))


def by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("with_key", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_missing_added_or_exchanged(signed: Path, key: Path, name: str, with_key: bool) -> None:
    CHANGES[name](signed)
    with pytest.raises(GateError, match=f"files differ.*found {name}"):
        require_intact(signed, 1, public(key) if with_key else None)


@pytest.mark.parametrize("name", [PROVENANCE, SIGNATURE])
def test_papers_that_are_too_large_to_hold(signed: Path, key: Path, name: str) -> None:
    os.truncate(signed / name, 1 << 36)  # most of it takes no disk
    for by in (None, public(key)):
        with pytest.raises(GateError, match=rf"no file that tundish wrote.*{name}.*found 68,719,476,736"):
            require_intact(signed, 1, by)


@pytest.mark.parametrize("ask", ["lstat", "read_bytes"])
def test_what_is_not_ours_to_read(signed: Path, ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that may be listed and not searched; who runs as root is never refused."""
    real = getattr(Path, ask)

    def refuse(path: Path) -> object:
        if path.name == PROVENANCE:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, ask, refuse)
    with pytest.raises(ModelError, match=rf"file cannot be read \(.*{PROVENANCE}\); found Permission denied"):
        require_intact(signed, 1)


def more_signatures(envelope: dict[str, Any]) -> None:
    envelope["signatures"].append(envelope["signatures"][0] | {"keyid": "00"})


ENVELOPES: dict[str, Callable[[dict[str, Any]], object]] = {
    "two signatures": more_signatures,
    "no signature": lambda envelope: envelope["signatures"].clear(),
    "an unknown field": lambda envelope: envelope.update(note="hello"),
    "an unknown field in the signature": lambda envelope: envelope["signatures"][0].update(cert="x"),
    "another type": lambda envelope: envelope.update(payloadType="text/plain"),
    "a list for a name": lambda envelope: envelope["signatures"][0].update(keyid=[]),
}


@pytest.mark.parametrize("with_key", [True, False])
@pytest.mark.parametrize("name", ENVELOPES)
def test_an_envelope_with_more_than_a_signature(signed: Path, key: Path, name: str, with_key: bool) -> None:
    path = signed / SIGNATURE
    envelope = json.loads(path.read_text())
    path.write_text(json.dumps(envelope, separators=(",", ":")) + "\n")
    assert require_intact(signed, 1, public(key)).signature is Signature.VALID, "it is what follows that matters"
    ENVELOPES[name](envelope)
    path.write_text(json.dumps(envelope, separators=(",", ":")) + "\n")
    with pytest.raises(GateError, match=f"{SIGNATURE}.*no envelope"):
        require_intact(signed, 1, public(key) if with_key else None)


GATE = {"figure": None, "threshold": None, "detail": ""}
GATES: dict[str, tuple[bool | None, list[dict[str, Any]], bool]] = {
    "all passed": (True, [{"name": "kl", "passed": True, "figure": 0.01, "threshold": 0.02}], True),
    "a share passed": (True, [{"name": "top1", "passed": True, "figure": 0.9, "threshold": 0.8}], True),
    "not judged": (None, [{"name": "kl", "passed": None, "figure": 9.0, "threshold": None}], True),
    "failed": (False, [{"name": "kl", "passed": False, "figure": 9.0, "threshold": 1.0}], True),
    "a gate failed": (True, [{"name": "runtime", "passed": True}, {"name": "stops", "passed": False}], False),
    "a gate failed, unsaid": (None, [{"name": "stops", "passed": False}], False),
    "no gate passed": (True, [{"name": "stops", "passed": None}], False),
    "too far": (True, [{"name": "kl", "passed": True, "figure": 0.03, "threshold": 0.02}], False),
    "too few": (True, [{"name": "top1", "passed": True, "figure": 0.7, "threshold": 0.8}], False),
    "failed, and none did": (False, [{"name": "stops", "passed": True}], False),
    "not verified, and passed": (None, [{"name": "stops", "passed": True}], False),
    "near enough": (False, [{"name": "kl", "passed": False, "figure": 0.01, "threshold": 0.02}], False),
    "near enough, unsaid": (None, [{"name": "kl", "passed": None, "figure": 0.01, "threshold": 0.02}], False),
}


@pytest.mark.parametrize("name", GATES)
def test_a_verdict_is_what_its_gates_come_to(poured: Path, key: Path, tmp_path: Path, name: str) -> None:
    """Even where somebody has put a name to it."""
    passed, gates, consistent = GATES[name]
    folder = tmp_path / "judged"
    shutil.copytree(poured, folder)
    manifest = read_manifest(folder)
    result: dict[str, Any] = {"passed": passed, "versions": {}, "divergence": None, "answer": None}
    manifest["verification"] = {"gguf": result | {"gates": [GATE | gate for gate in gates]}}
    write_papers(folder, manifest, load_signer(key))
    for by in (None, public(key)):
        if consistent:
            require_intact(folder, 1, by)
        else:
            with pytest.raises(GateError, match=r"the manifest is inconsistent.*gguf"):
                require_intact(folder, 1, by)


def test_whoever_writes_all_papers_anew_needs_the_key(signed: Path, key: Path, tmp_path: Path) -> None:
    """A forged build passes without a key, which cannot be helped, and not with one."""
    (signed / "gguf" / "model.gguf").write_bytes(b"forged")
    manifest: dict[str, Any] = json.loads((signed / MANIFEST).read_text())
    digest = sha256_of([signed / "gguf" / "model.gguf"])[signed / "gguf" / "model.gguf"]
    manifest["targets"]["gguf"]["files"]["model.gguf"]["sha256"] = digest
    envelope = (signed / SIGNATURE).read_bytes()
    write_papers(signed, manifest, None)
    assert require_intact(signed, 1).signature is Signature.NONE
    with pytest.raises(GateError, match="not signed"):
        require_intact(signed, 1, public(key))
    (signed / SIGNATURE).write_bytes(envelope)
    with pytest.raises(GateError, match=r"found gguf/README\.md|found gguf/model\.gguf"):
        require_intact(signed, 1, public(key))
    sign_build(signed, write_keys(tmp_path, "other"), 1)
    with pytest.raises(
        GateError,
        match=r"not signed by this key.*expected .* the key [0-9a-f]{16}.*found one by [0-9a-f]{16}",
    ):
        require_intact(signed, 1, public(key))


def test_others_can_check_the_signature(signed: Path, key: Path) -> None:
    """By DSSE's own rule and nothing but cryptography: https://github.com/secure-systems-lab/dsse/blob/master/protocol.md"""
    envelope = json.loads((signed / SIGNATURE).read_text())
    payload = base64.b64decode(envelope["payload"])
    assert payload == (signed / PROVENANCE).read_bytes()
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    kind = envelope["payloadType"].encode()
    encoded = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
    private = load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, Ed25519PrivateKey)
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    private.public_key().verify(signature, encoded)
    with pytest.raises(InvalidSignature):
        private.public_key().verify(signature, payload)
    again = (signed / SIGNATURE).read_bytes()
    sign_build(signed, key, 1)
    assert (signed / SIGNATURE).read_bytes() == again, "the same bytes every time"


def test_the_statement_keeps_the_rules_of_in_toto_and_slsa(poured: Path) -> None:
    """Read by in-toto's own messages, which know every field that may be there."""
    text = (poured / PROVENANCE).read_text()
    statement = Statement.copy_from_pb(json_format.Parse(text, StatementMessage()))
    statement.validate()
    assert statement.pb.predicate_type == "https://slsa.dev/provenance/v1"
    predicate = json_format.ParseDict(json.loads(text)["predicate"], Provenance())
    definition, manifest = predicate.build_definition, read_manifest(poured)
    assert ":" in definition.build_type and predicate.run_details.builder.id == "pkg:pypi/tundish@0.1.0"
    assert json_format.MessageToDict(definition.external_parameters)["recipe"] == manifest["recipe"]
    dependencies = {each.name: each.digest["sha256"] for each in definition.resolved_dependencies}
    assert dependencies == manifest["source"]["files"] and any(name.endswith("safetensors") for name in dependencies)
    files = [path for path in poured.rglob("*") if path.is_file() and path.name != PROVENANCE]
    found = {path.relative_to(poured).as_posix(): digest for path, digest in sha256_of(files).items()}
    assert {each.name: each.digest["sha256"] for each in statement.pb.subject} == found


def test_keys_that_are_none(tmp_path: Path, key: Path, signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.pem"
    locked = Ed25519PrivateKey.generate().private_bytes(*PKCS8, BestAvailableEncryption(b"secret"))
    cases = {
        "no private key that can be read": b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n",
        "another kind of key": generate_private_key(SECP256R1()).private_bytes(*PKCS8, NoEncryption()),
        "locked by a password": locked,
    }
    for found, pem in cases.items():
        other.write_bytes(pem)
        with pytest.raises(UsageError, match=found) as error:
            load_signer(other)
        assert "c2VjcmV0" not in str(error.value)
    with pytest.raises(UsageError, match="cannot read the key"):
        load_signer(tmp_path / "absent.pem")
    with pytest.raises(UsageError, match="a private key, which is nothing to hand on"):
        require_intact(signed, 1, key)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert load_signer(None) is None
    with pytest.raises(UsageError, match=f"no key to sign with.*{KEY_VARIABLE}"):
        sign_build(signed, None, 1)
    monkeypatch.setenv(KEY_VARIABLE, key.read_text())
    before = (signed / SIGNATURE).read_bytes()
    sign_build(signed, None, 1)
    assert (signed / SIGNATURE).read_bytes() == before, "the environment's key is the file's"
    assert "PRIVATE" not in repr(load_signer(None))


def test_runtimes_do_not_get_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    (tmp_path / "look.py").write_text(f"import os, sys\nsys.exit({KEY_VARIABLE!r} in os.environ)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_child("look", [], tmp_path / "log", 60, 1).failure is None


@pytest.mark.parametrize("module", [chat_renderer, matrix_worker])
def test_nor_do_templates_and_cells(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[dict[str, str]] = []

    def begin(*arguments: object, env: dict[str, str], **rest: object) -> None:
        given.append(env)
        raise InterruptedError

    monkeypatch.setenv(KEY_VARIABLE, "secret")
    monkeypatch.setenv("PATH", "as it was")
    monkeypatch.setattr(module.subprocess, "Popen", begin)
    with pytest.raises(InterruptedError):
        if module is chat_renderer:
            monkeypatch.setattr(chat_renderer, "template_variables", lambda tokenizer: ("", {}))
            chat_renderer.chat_renderer(cast(Any, None)).__enter__()
        else:
            asked = matrix_worker.Asked("run", "build", "m", None, (), (), 1, False, None, str(tmp_path), {})
            matrix_worker._run(asked, None, cast(Any, SimpleNamespace(address="here")), lambda: True, 0.0)
    assert given[0]["PATH"] == "as it was" and KEY_VARIABLE not in given[0]


def test_nothing_says_where_it_was_built(poured: Path, checkpoint: Path) -> None:
    for path in poured.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for folder in (checkpoint.parent, poured.parent, Path.home(), Path(__file__).resolve().parents[2]):
                assert str(folder).encode() not in data, path


def test_another_build_of_the_same_key_is_not_the_one_that_was_expected(
    signed: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was put under this one's name: nothing of it is changed, and it is signed."""
    other = tmp_path / "other"
    shutil.copytree(signed, other)
    manifest = read_manifest(other)
    manifest["source"] |= {"name": "tiny", "repo_id": "acme/tiny", "revision": "b" * 40}
    write_papers(other, manifest, load_signer(key))
    shutil.rmtree(signed)
    other.rename(signed)
    sound = [
        "recipe=int4",
        f"recipe={manifest['recipe_digest']}",
        "model=acme/tiny",
        "model=tiny",
        f"commit={'b' * 40}",
    ]
    for expected in sound:
        verify(signed, key=public(key), expect=[expected], files_only=True)
        said = capsys.readouterr().err
        assert f"recipe int4, model acme/tiny, commit {'b' * 40}; signature: valid, by the key " in said
        assert key_id(public(key)) in said
    for expected in ("recipe=int8", "model=acme/other", "model=evil/tiny", f"commit={'a' * 40}"):
        for files_only in (True, False):
            with pytest.raises(GateError, match=f"another build.*expected {expected}; found"):
                verify(signed, key=public(key), expect=[expected], files_only=files_only)
    with pytest.raises(GateError, match="expected model=evil/tiny; found"):
        verify(signed, key=public(key), expect=["recipe=int4", "model=evil/tiny"], files_only=True)
    for nonsense in (["recipe"], ["recipe="], ["size=1"], ["recipe=int4", "recipe=int4"]):
        with pytest.raises(UsageError, match="nothing to expect"):
            verify(signed, expect=nonsense, files_only=True)
