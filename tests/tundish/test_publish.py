"""A finished folder goes under its final name, and what stood there is never harmed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converters.errors import UsageError
from exporters.base import Target
from tundish.manifest_file import FORMAT
from tundish.publish import publish, require_replaceable, staging


def old_build(out: Path) -> None:
    (out / "gguf").mkdir(parents=True)
    (out / "gguf" / "model.gguf").write_text("old")
    (out / "report.md").write_text("old")
    manifest = {
        "format": FORMAT,
        "tundish": "0",
        "source": {"name": "m", "folder": "/m", "repo_id": None, "revision": None, "files": {"config.json": "00"}},
        "recipe": {},
        "recipe_digest": "00",
        "weights": {"w": {"shape": [1], "scheme": "fp32"}},
        "targets": {"gguf": {"files": {"model.gguf": {"bytes": 3, "sha256": "00"}}}},
    }
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_replaces_an_earlier_build(tmp_path: Path) -> None:
    out = tmp_path / "a name with späces"
    old_build(out)
    require_replaceable(out, [Target.GGUF])
    with staging(out) as folder:
        (folder / "new").write_text("new")
        publish(folder, out)
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_build(out)
    with pytest.raises(KeyboardInterrupt), staging(out) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "gguf" / "model.gguf").read_text() == "old"


def test_a_failed_rename_puts_the_old_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_build(out)
    with pytest.raises(Exception, match="cannot write"):
        publish(tmp_path / "absent", out)
    assert (out / "gguf" / "model.gguf").read_text() == "old"


@pytest.mark.parametrize("kind", ["foreign folder", "file", "extra file", "foreign manifest", "link", "link inside"])
def test_refuses_what_it_did_not_write(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(tmp_path)
    else:
        old_build(out)
        if kind == "foreign folder":
            (out / "manifest.json").unlink()
        elif kind == "extra file":
            (out / "gguf" / "notes.txt").write_text("mine")
        elif kind == "link inside":
            (out / "mine").symlink_to(tmp_path, target_is_directory=True)
        else:
            (out / "manifest.json").write_text("[]")
    with pytest.raises(UsageError, match=r"--out|not a manifest"):
        require_replaceable(out, [Target.GGUF])


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    require_replaceable(out, [Target.GGUF])
    with staging(out) as folder:
        publish(folder, out)


def test_other_containers_are_not_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_build(out)
    with pytest.raises(UsageError, match="would remove: gguf"):
        require_replaceable(out, [Target.MLX])
