"""A build that was killed goes on, and comes to the same bytes whatever the kill, or the disk, did to its folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from converters.errors import ResourceError
from exporters.base import Target
from tests.tundish.tiny import INT4, QUIET, write_recipe
from tundish import job, plan, verify
from tundish import pour as pouring
from tundish.cache import cache_disk
from tundish.job import Choices, build
from tundish.journal import JOURNAL, Done, Journal, has_journal, read_journal
from tundish.results import Gate, TargetResult
from tundish.watcher import Watcher
from tundish.worker import package_versions

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX locks")

TARGETS = {"gguf": {}, "mlx": {"activations": "fp32"}}


@pytest.fixture(scope="module")
def recipe(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("r") / "r.yaml", checkpoint, schemes=INT4, targets=TARGETS, context=128)


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    build(Choices(str(recipe), out=out, verify=False), QUIET)
    return out


@pytest.fixture(scope="module")
def whole(undisturbed: Path) -> dict[str, bytes]:
    """What is in it."""
    return contents(undisturbed)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def modes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.lstat().st_mode for path in (folder, *folder.rglob("*"))}


def interrupted(recipe: Path, out: Path, after: int = 10) -> Path:
    """Build until that many blocks are poured, and then as a signal has it. Returns what is left."""
    left = after

    def count(elements: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(Choices(str(recipe), out=out, verify=False), Watcher(QUIET.say, QUIET.start, count))
    assert not out.exists()
    (folder,) = out.parent.glob(".out.*.partial")
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights of which blocks are quantized, as that happens."""
    names: list[str] = []
    pour_block = pouring.pour_block

    def noted(block: Any, *arguments: Any) -> bytes:
        names.append(block[0].name)
        return pour_block(block, *arguments)

    monkeypatch.setattr(pouring, "pour_block", noted)
    return names


def resumed(recipe: Path, out: Path, **choices: Any) -> list[str]:
    said: list[str] = []
    build(Choices(str(recipe), out=out, verify=False, **choices), Watcher(said.append, QUIET.start, QUIET.advance))
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    return said


def test_it_goes_on(recipe: Path, whole: dict[str, bytes], tmp_path: Path, made: list[str]) -> None:
    folder = interrupted(recipe, tmp_path / "out")
    blocks = len(found.blocks) if (found := read_journal(folder)) else 0
    assert blocks == 10
    made.clear()
    said = resumed(recipe, tmp_path / "out")
    assert f"taken over from a build that was killed: 10 of {10 + len(made)} blocks of rows, by digest" in said
    assert len(made) > 5 and contents(tmp_path / "out") == whole


def test_it_goes_on_from_a_kill_while_the_disk_is_waited_for(
    recipe: Path, whole: dict[str, bytes], tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is done by then but the name, and syncing gigabytes takes a while."""
    with monkeypatch.context() as killed:
        killed.setattr("tundish.publish._sync", lambda folder: os.kill(os.getpid(), signal.SIGKILL))
        assert build_in_a_process(recipe, tmp_path / "out", None, tmp_path / "said") == -signal.SIGKILL
    (tmp_path / "said").unlink()
    said = resumed(recipe, tmp_path / "out")
    assert any("taken over" in line for line in said) and not made
    assert contents(tmp_path / "out") == whole


def test_it_goes_on_twice(recipe: Path, whole: dict[str, bytes], tmp_path: Path, made: list[str]) -> None:
    folder = interrupted(recipe, tmp_path / "out", 5)
    made.clear()
    assert interrupted(recipe, tmp_path / "out", 12) == folder
    made.clear()
    said = resumed(recipe, tmp_path / "out")
    assert f"killed: 12 of {12 + len(made)} blocks" in said[-2] and contents(tmp_path / "out") == whole


def spoil_bytes(folder: Path) -> None:
    for path in (folder / "mlx" / "model.safetensors", folder / "gguf" / "model.gguf"):
        data = bytearray(path.read_bytes())
        for at in range(0, len(data), 5000):
            data[at] ^= 1
        path.write_bytes(data)


def lose_what_was_written_last(folder: Path) -> None:
    """As a power failure may: the journal is there, and the space of the files, and not all that was written."""
    path = folder / "gguf" / "model.gguf"
    nbytes = path.stat().st_size
    os.truncate(path, nbytes // 3)
    os.truncate(path, nbytes)


def replace_by_a_link(folder: Path) -> None:
    path = folder / "gguf" / "model.gguf"
    path.rename(folder.parent / "precious")
    path.symlink_to(folder.parent / "precious")


def add_strangers(folder: Path) -> None:
    (folder / "gguf" / "old.gguf").touch()
    (folder / "manifest.json").write_text("{}")
    (folder / "more").symlink_to(folder.parent)


def add_strangers_of_every_kind(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "gguf" / "in" / "side").mkdir(parents=True, mode=0)
    (folder / "gguf" / "link").symlink_to(folder.parent)
    (folder / "gguf" / "model.gguf").unlink()
    (folder / "gguf" / "model.gguf").mkdir()
    (folder / "gguf" / "model.gguf" / "more").touch()
    (folder / "mlx" / "model.safetensors").unlink()
    os.mkfifo(folder / "mlx" / "model.safetensors")
    (folder / "mlx" / "config.json").mkdir()
    (folder / "manifest.json.new").mkdir()
    os.mkfifo(folder / "report.md")


def change_permissions(folder: Path) -> None:
    (folder / "gguf" / "model.gguf").chmod(0o4755)
    (folder / "mlx" / "model.safetensors").chmod(0)
    (folder / "mlx").chmod(0o700)
    folder.chmod(0o777)


def journal_is_a_pipe(folder: Path) -> None:
    (folder / JOURNAL).unlink()
    os.mkfifo(folder / JOURNAL)


def digested(text: str) -> bytes:
    """A line of a journal that has its digest."""
    return f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}\n".encode()


def change_journal(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / JOURNAL
        path.write_bytes(change(path.read_bytes()))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_bytes,
        lose_what_was_written_last,
        replace_by_a_link,
        add_strangers,
        add_strangers_of_every_kind,
        change_permissions,
        journal_is_a_pipe,
        lambda folder: (folder / "gguf" / "model.gguf").unlink(),
        lambda folder: shutil.rmtree(folder / "mlx"),
        lambda folder: os.truncate(folder / "gguf" / "model.gguf", 100),
        change_journal(lambda data: data[:-3]),
        change_journal(lambda data: data.replace(b"blocks.0", b"blocks.1")),
        change_journal(lambda data: data + b"0123 torn"),
        change_journal(lambda data: b""),
        change_journal(lambda data: bytes(len(data))),
        change_journal(lambda data: data.split(b"\n")[0] + b"\n"),
        change_journal(lambda data: data + digested('["verified","gguf",{}]')),
    ],
)
def test_what_is_not_as_it_was_is_made_anew(
    recipe: Path, whole: dict[str, bytes], undisturbed: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = interrupted(recipe, tmp_path / "a" / "out")
    spoil(folder)
    precious = tmp_path / "a" / "precious"
    before = precious.read_bytes() if precious.exists() else b""
    build(Choices(str(recipe), out=tmp_path / "a" / "out", verify=False), QUIET)
    assert contents(tmp_path / "a" / "out") == whole
    assert modes(tmp_path / "a" / "out") == modes(undisturbed), "no folder more, and all with the same permissions"
    assert not before or precious.read_bytes() == before, "nothing is written through a link"
    assert {path.name for path in (tmp_path / "a").iterdir()} <= {"out", "precious"}


@pytest.mark.parametrize("change", ["recipe", "checkpoint", "fresh", "library"])
def test_another_build_takes_nothing_over(
    checkpoint: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    moving, out = tmp_path / "moving", tmp_path / "a" / "out"
    shutil.copytree(checkpoint, moving)
    recipe = write_recipe(tmp_path / "r.yaml", moving, schemes=INT4, targets={"gguf": {}}, context=128)
    interrupted(recipe, out)
    if change == "recipe":
        write_recipe(recipe, moving, schemes={"default": "int4_g32"}, targets={"gguf": {}}, context=128)
    elif change == "checkpoint":
        weights = max(moving.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-2] + b"\0\0")
    elif change == "library":
        monkeypatch.setattr("tundish.resume.version", lambda name: "0.0")
    made.clear()
    said = resumed(recipe, out, fresh=change == "fresh")
    assert any(line.startswith("removed: ") for line in said) and not any("taken over" in line for line in said)
    build(Choices(str(recipe), out=tmp_path / "b" / "out", verify=False), QUIET)
    assert len(made) % 2 == 0, "as many blocks as the undisturbed one"
    assert contents(out) == contents(tmp_path / "b" / "out")


def test_a_checkpoint_that_changes_before_the_kill(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    """What was read after the change, or while its digest was taken, is not of the digest that the next build finds."""
    moving, out = tmp_path / "moving", tmp_path / "a" / "out"
    shutil.copytree(checkpoint, moving)
    recipe = write_recipe(tmp_path / "r.yaml", moving, schemes=INT4, targets={"gguf": {}}, context=128)
    weights, left = max(moving.glob("*.safetensors")), 8

    def change(elements: int) -> None:
        nonlocal left
        left -= 1
        if left == 4:
            data = weights.read_bytes()
            weights.write_bytes(data[:-2000] + bytes(2000))
        if left == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(Choices(str(recipe), out=out, verify=False, threads=1), Watcher(QUIET.say, QUIET.start, change))
    for folder in out.parent.glob(".out.*"):
        found = read_journal(folder)
        assert found is not None and len(found.blocks) <= 4
    resumed(recipe, out)
    build(Choices(str(recipe), out=tmp_path / "b" / "out", verify=False), QUIET)
    assert contents(out) == contents(tmp_path / "b" / "out")


def test_an_error_leaves_nothing(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is not to stay full."""
    folder = interrupted(recipe, tmp_path / "out")
    assert has_journal(folder)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"No space left.*expected [\d,]+ bytes for the whole build"):
        build(Choices(str(recipe), out=tmp_path / "out", verify=False), QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_left_counts_as_room(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    """Also where the cache is on another disk."""
    interrupted(recipe, tmp_path / "out")
    stat = Path.stat

    def elsewhere(path: Path, **names: bool) -> os.stat_result:
        state = stat(path, **names)
        return os.stat_result((*state[:2], state.st_dev + apart, *state[3:10])) if path == cache else state

    cache = cache_disk()
    monkeypatch.setattr(Path, "stat", elsewhere)
    usage = shutil.disk_usage(tmp_path)
    make_plan = plan.make_plan

    def tight(*arguments: Any) -> plan.Plan:
        made = replace(make_plan(*arguments), kept=1)  # or nothing is asked of the cache's disk
        free = made.disk - sum(big.nbytes for each in made.layouts.values() for big in each.big.values())
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        return made

    monkeypatch.setattr(job, "make_plan", tight)
    resumed(recipe, tmp_path / "out")
    with pytest.raises(ResourceError, match="not enough disk"):
        build(Choices(str(recipe), out=tmp_path / "out", verify=False), QUIET)


@pytest.mark.parametrize("change", ["nothing", "a byte", "a runtime", "it had failed"])
def test_what_was_verified_stays_verified(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """If the artifact's bytes and the runtime's version are the same; what failed is tried again."""
    asked: list[Target] = []
    passed, kill = change != "it had failed", True

    def fake(*arguments: Any) -> TargetResult:
        exporter = arguments[3]
        asked.append(exporter.target)
        if exporter.target == Target.MLX and kill:
            raise KeyboardInterrupt
        versions = package_versions(exporter.runtime_requires)
        gates = (Gate("runtime", passed, detail="opened"), Gate("kl", True, 0.125, 0.25))
        return TargetResult(exporter.target, gates, versions, None, "42")

    monkeypatch.setattr(verify, "_verify_target", fake)
    monkeypatch.setattr(verify, "make_reference", lambda *arguments: None)
    choices = Choices(str(recipe), out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        build(choices, QUIET)
    kill, passed = False, True
    if change == "a byte":
        (folder,) = tmp_path.glob(".out.*.partial")
        journal = read_journal(folder)
        assert journal is not None
        journal.verified["gguf"]["files"]["model.gguf"] = "0" * 64
        again = Journal(folder, lambda: "key", journal)
        again.add_verified("gguf", journal.verified["gguf"])
        again.close()
    elif change == "a runtime":
        monkeypatch.setattr("tundish.resume.package_versions", lambda modules: {"xllamacpp": "0"})
    asked.clear()
    said: list[str] = []
    manifest = build(choices, Watcher(said.append, QUIET.start, QUIET.advance))
    assert asked == ([Target.MLX] if change == "nothing" else [Target.GGUF, Target.MLX])
    told = [line for line in said if line.startswith("taken over")]
    assert len(told) == 1 and told[0].endswith("and that gguf was verified") == (change == "nothing")
    assert manifest["verification"]["gguf"]["gates"][1]["figure"] == 0.125
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest


def test_lines_wait_for_the_key(tmp_path: Path) -> None:
    keys: list[str] = []
    journal = Journal(tmp_path, lambda: keys[-1] if keys else None)
    journal.add_block(("w", 0, 64), Done("00", b"ab"))
    assert not has_journal(tmp_path) and not list(tmp_path.iterdir())
    keys.append("the key")
    journal.add_block(("w", 64, 128), Done("11", b"cd"))
    journal.close()
    found = read_journal(tmp_path)
    assert found is not None and found.key == "the key"
    assert found.blocks == {("w", 0, 64): Done("00", b"ab"), ("w", 64, 128): Done("11", b"cd")}
    assert found.nbytes == (tmp_path / JOURNAL).stat().st_size


@pytest.mark.parametrize(
    "text",
    ["5", "[]", "", "{}", "null", '["block","x"]', '["block","w",0,64,"00","zz"]', '["verified",1,{}]', "[" * 100_000],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_journal_with_a_line_that_is_none_is_none(tmp_path: Path, text: str, first: bool) -> None:
    head = digested('[1,"key"]')
    (tmp_path / JOURNAL).write_bytes(head)
    assert has_journal(tmp_path)
    (tmp_path / JOURNAL).write_bytes((b"" if first else head) + digested(text))
    assert not has_journal(tmp_path)


def test_a_journal_that_is_another_kind_of_thing_is_none(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / JOURNAL, tmp_path / "elsewhere"
    elsewhere.write_bytes(digested('[1,"key"]'))
    for make in (
        path.mkdir,
        partial(os.mkfifo, path),
        partial(path.symlink_to, elsewhere),
        partial(os.link, elsewhere, path),
    ):
        make()
        assert read_journal(tmp_path) is None
        path.rmdir() if path.is_dir() else path.unlink()


def test_every_flipped_bit_of_a_journal_is_seen(tmp_path: Path) -> None:
    journal = Journal(tmp_path, lambda: "key")
    for start in range(3):
        journal.add_block(("w", start, start + 1), Done("00", b"ab"))
    journal.close()
    data = (tmp_path / JOURNAL).read_bytes()
    whole = read_journal(tmp_path)
    for at in range(len(data)):
        (tmp_path / JOURNAL).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        found = read_journal(tmp_path)
        line = data[:at].count(b"\n")
        assert found is None if line == 0 else found is not None and len(found.blocks) <= line - 1, at
    assert whole is not None and len(whole.blocks) == 3


def build_in_a_process(recipe: Path, out: Path, kill_after: float | None, said: Path) -> int:
    """Its status. Everything is imported already, so that kills find it at work."""
    child = os.fork()
    if child == 0:
        with said.open("w") as file, suppress(BaseException):
            watcher = Watcher(lambda text: print(text, file=file, flush=True), QUIET.start, QUIET.advance)
            build(Choices(str(recipe), out=out, verify=False), watcher)
            os._exit(0)
        os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_kills_at_fifty_moments(recipe: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """There is the earlier build or the whole new one, whenever it is looked at; the same command ends with that."""
    out, said, chance = tmp_path / "a" / "out", tmp_path / "said", np.random.default_rng(0)
    earlier = tmp_path / "earlier"
    build(Choices(str(write_recipe_like(recipe, tmp_path / "e.yaml")), out=earlier, verify=False), QUIET)
    start = time.perf_counter()
    assert build_in_a_process(recipe, out, None, said) == 0
    seconds, went_on = time.perf_counter() - start, 0
    for moment in range(50):
        shutil.rmtree(out.parent)
        if moment % 2:
            shutil.copytree(earlier, out)
        before = contents(out)
        for _ in range(1 + moment % 3):
            build_in_a_process(recipe, out, chance.uniform(0, 1.1 * seconds), said)
            assert contents(out) in (before, whole)
        assert build_in_a_process(recipe, out, None, said) == 0
        assert contents(out) == whole and [path.name for path in out.parent.iterdir()] == ["out"]
        went_on += "taken over" in said.read_text()
    assert went_on, "some came while it wrote"


def write_recipe_like(recipe: Path, path: Path) -> Path:
    """The same with other schemes."""
    path.write_text(json.dumps(json.loads(recipe.read_text()) | {"schemes": {"default": "fp32"}}))
    return path
