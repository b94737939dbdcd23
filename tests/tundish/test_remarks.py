"""What is said of a model before it is built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from converters.errors import ModelError
from converters.source import Source
from exporters.base import Model
from tests.tundish.tiny import INT4, QUIET, write_recipe
from tundish.escapes import markdown
from tundish.job import Choices, build, plan_job
from tundish.model import open_model
from tundish.recipe import load_recipe
from tundish.remarks import remarks, try_template
from tundish.report import write_report
from tundish.watcher import Watcher


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    return copy


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def opened(folder: Path, tmp_path: Path) -> Model:
    return open_model(Source("m", folder), load_recipe(write_recipe(tmp_path / "r.yaml", folder)))


def test_nothing_is_said_of_an_ordinary_model(folder: Path, tmp_path: Path) -> None:
    assert remarks(opened(folder, tmp_path), folder) == ()


@pytest.mark.parametrize("spelling", ["text", "object"])
def test_eos_token_that_stops_nothing(folder: Path, tmp_path: Path, spelling: str) -> None:
    tokenizer = opened(folder, tmp_path).tokenizer
    (stop, *others) = tokenizer.eos_ids
    rewrite(folder / "config.json", lambda config: config | {"eos_token_id": others or [0]})
    (folder / "generation_config.json").unlink(missing_ok=True)
    token = tokenizer.tokens[stop].text
    eos = {"content": token, "__type": "AddedToken"} if spelling == "object" else token
    rewrite(folder / "tokenizer_config.json", lambda settings: settings | {"eos_token": eos})
    (remark,) = remarks(opened(folder, tmp_path), folder)
    assert f"eos_token {token!r} ({stop}) is none of the ids that stop generation" in remark


def test_named_templates_are_said(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    names = [{"name": name, "template": "{{ messages[0].content }}"} for name in ("default", "tool_use", "\x1b[2J")]
    rewrite(folder / "tokenizer_config.json", lambda settings: settings | {"chat_template": names})
    (remark,) = remarks(opened(folder, tmp_path), folder)
    assert "the default one alone is converted; left out: 'tool_use', '\\x1b[2J'" in remark
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("x")
    assert "'rag', 'tool_use'" in remarks(opened(folder, tmp_path), folder)[0]
    rewrite(folder / "tokenizer_config.json", lambda settings: settings | {"chat_template": names[1:]})
    assert "none is called default" in remarks(opened(folder, tmp_path), folder)[0]


def test_a_broken_template_is_told_before_any_work(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }")
    recipe = write_recipe(tmp_path / "r.yaml", folder)
    for work in (plan_job, build):
        with pytest.raises(ModelError, match=r"chat template cannot be rendered.*TemplateSyntaxError"):
            work(Choices(str(recipe), out=tmp_path / "out"), QUIET)


def test_no_template_is_none_to_try(folder: Path, tmp_path: Path) -> None:
    model = opened(folder, tmp_path)
    recipe = load_recipe(tmp_path / "r.yaml")
    try_template(model, recipe)
    try_template(replace(model, tokenizer=replace(model.tokenizer, chat_template=None)), recipe)


def test_notes_reach_terminal_plan_and_manifest(folder: Path, tmp_path: Path) -> None:
    rewrite(folder / "config.json", lambda config: config | {"my_note": 1, "_unsloth": True})
    (folder / "chat_template.jinja").write_text("{{")  # which hinders no build that is not verified
    said: list[str] = []
    watcher = Watcher(said.append, lambda text, total: None, lambda amount: None)
    recipe = write_recipe(tmp_path / "r.yaml", folder, targets={"gguf": {}}, verify={"enabled": False})
    choices = Choices(str(recipe), out=tmp_path / "out")
    (remark,) = plan_job(choices, watcher)[1].remarks
    assert "'_unsloth', 'my_note'" in remark
    manifest = build(choices, watcher)
    assert manifest["remarks"] == [remark]
    assert f"| {markdown(remark)} |" in write_report(manifest)
    assert said.count(f"note: {remark}") == 2


def test_a_weight_that_is_not_finite_is_named_where_calibration_meets_it(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate_up_proj.weight"
    (shard,) = [path for path in folder.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(shard)
    tensors[name][7, 3] = np.nan
    save_file(tensors, shard, {"format": "pt"})
    calibration = {"source": "random-tokens"}
    settings: dict[str, Any] = {"targets": {"gguf": {}}, "schemes": INT4, "calibration": calibration}
    recipe = write_recipe(tmp_path / "r.yaml", folder, **settings)
    with pytest.raises(ModelError, match=r"NaN or Inf \(blocks\.1\.mlp_gate in .*element \[7, 3\]\)"):
        build(Choices(str(recipe), out=tmp_path / "out"), QUIET)
