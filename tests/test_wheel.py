"""The wheel, installed where no source is: the commands run, the recipes are there, and torch is not asked for."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.converters.tiny_tokenizers import write_byte_level

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("converters", "exporters", "recipes", "tundish")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    # Built from a copy: setuptools leaves build/ and *.egg-info beside the sources.
    source = folder / "source"
    source.mkdir()
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source / name)
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


def copy(path: Path, to: Path) -> None:
    if path.is_file():
        to.write_bytes(path.read_bytes())
    elif path.name != "__pycache__":
        to.mkdir()
        for inner in path.iterdir():
            copy(inner, to / inner.name)


def make_venv(folder: Path, *installed: str, see_ours: bool) -> Path:
    """Its scripts' folder. With see_ours, the packages of the running environment can be imported, save for tundish."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(scripts / "python"), "install"]
    subprocess.run([*pip, *installed], check=True, capture_output=True, text=True)
    if see_ours:
        (packages,) = folder.glob("lib/python*/site-packages") if os.name != "nt" else folder.glob("Lib/site-packages")
        # A .pth line naming a folder adds it behind site-packages and does not run the .pth files in it, so that an
        # editable tundish of the running environment stays out of sight.
        (packages / "ours.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    return scripts


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_venv(tmp_path_factory.mktemp("installed") / "v", "--no-deps", str(wheel), see_ours=True)


def run(command: list[str], cwd: Path, status: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def recipe_names() -> set[str]:
    return {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


def test_wheel_holds_packages_and_data_and_nothing_else(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    assert files == {path.relative_to(ROOT).as_posix() for path in sources if "__pycache__" not in path.parts}
    assert {"recipes/base/phi35.yaml", "recipes/recipe.schema.json", "tundish/py.typed"} <= files


def test_installed_wheel_finds_itself_and_not_the_sources(scripts: Path, tmp_path: Path) -> None:
    code = f"import json, {', '.join(PACKAGES)}; print(json.dumps([m.__file__ for m in ({', '.join(PACKAGES)})]))"
    for file in json.loads(run([str(scripts / "python"), "-c", code], tmp_path)):
        assert Path(file).is_relative_to(scripts.parent)


def test_commands_of_the_installed_wheel(scripts: Path, tmp_path: Path) -> None:
    tundish = str(scripts / "tundish")
    assert "build" in run([tundish, "--help"], tmp_path)
    assert {row["name"] for row in json.loads(run([tundish, "recipes", "--json"], tmp_path))} == recipe_names()
    schema = json.loads(run([tundish, "recipes", "--schema"], tmp_path))
    assert schema == json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert "recipe" in run([str(scripts / "python"), "-m", "tundish", "recipes", "no-such-recipe"], tmp_path, status=2)
    assert not list(tmp_path.iterdir())


def tiny_checkpoint(folder: Path) -> Path:
    vocab_size = write_byte_level(folder, None).vocab_size
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_planning_asks_for_no_torch(scripts: Path, tmp_path: Path) -> None:
    """Every container whose writer does not go through transformers, which imports torch where there is one."""
    command = ["tundish", "plan", "phi35-all-int4", "--model", str(tiny_checkpoint(tmp_path / "model")), "--json"]
    command += ["--out", str(tmp_path / "out")]
    for target in ("gguf", "mlx", "onnx"):
        command += ["--target", target]
    code = f"""
import json, sys
sys.argv = {command!r}
from tundish.cli import app
app(standalone_mode=False)
print(json.dumps([name for name in ("torch", "transformers", "openvino") if name in sys.modules]), file=sys.stderr)
"""
    done = subprocess.run(
        [str(scripts / "python"), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["targets"]) == {"gguf", "mlx", "onnx"}
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_core_alone_from_an_index(wheel: Path, tmp_path: Path) -> None:
    """An empty environment with the core dependencies only: no torch, no runtime, and commands say what is missing."""
    scripts = make_venv(tmp_path / "v", "--only-binary", ":all:", str(wheel), see_ours=False)
    tundish, empty = str(scripts / "tundish"), tmp_path / "empty"
    empty.mkdir()
    code = "import importlib.metadata as m; print(*sorted(d.name.lower() for d in m.distributions()))"
    installed = set(run([str(scripts / "python"), "-c", code], empty).split())
    assert "tundish" in installed
    assert not installed & {"torch", "transformers", "onnx", "onnxruntime", "openvino", "mlx", "xllamacpp"}
    assert {row["name"] for row in json.loads(run([tundish, "recipes", "--json"], empty))} == recipe_names()
    rows = json.loads(run([tundish, "doctor", "--json"], empty))
    assert {row["target"] for row in rows} == {"gguf", "onnx", "openvino", "mlx"}
    assert not any(row["verifies"] for row in rows)
    assert all("pip install 'tundish[" in row["mend"] for row in rows)
