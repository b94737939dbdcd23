"""The architecture and the package's promises: who imports whom, what is declared, what is light."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import tundish

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("converters", "exporters", "tundish")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# What a command that only reads recipes must not wait for.
SLOW_TO_IMPORT = {
    "dask", "distributed", "gguf", "huggingface_hub", "matplotlib", "mlx", "numba", "onnx", "onnxruntime",
    "onnxruntime_genai", "openvino", "openvino_genai", "openvino_tokenizers", "pyarrow", "tokenizers", "torch",
    "transformers", "xllamacpp",
}  # fmt: skip
SDKS = SLOW_TO_IMPORT - {"gguf", "huggingface_hub", "matplotlib", "numba", "pyarrow", "tokenizers"}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module; `top` is false within a function, `typing` is true under `if TYPE_CHECKING`."""

    file: Path
    module: str
    top: bool
    typing: bool

    @property
    def root(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)} imports {self.module}"


def imports(node: ast.AST, file: Path, top: bool = True, typing: bool = False) -> Iterator[Import]:
    """Every import below a node. Relative ones are errors of their own: the house imports by full names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(file, alias.name, top, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, f"relative import in {file}"
            yield Import(file, child.module, top, typing)
            # `from exporters import onnx` names a module too.
            yield from (Import(file, f"{child.module}.{alias.name}", top, typing) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, file, False, typing)
        else:
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from imports(child, file, top, typing or guarded)


def imports_below(folder: str) -> list[Import]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return [found for file in files for found in imports(ast.parse(file.read_text(encoding="utf-8"), str(file)), file)]


ALL = [found for package in PACKAGES for found in imports_below(package)]


def container(path: Path) -> str | None:
    """The exporter that a file belongs to: exporters/<container>/…"""
    parts = path.relative_to(ROOT).parts
    return parts[1] if parts[0] == "exporters" and len(parts) > 2 else None


def normal(requirement: str) -> str:
    """The normalized name of a requirement such as `mlx[cpu]>=0.32; sys_platform == 'linux'`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def extra_names(extra: str) -> set[str]:
    """The packages of an extra, those of the extras it refers to included."""
    names: set[str] = set()
    for requirement in EXTRAS[extra]:
        own = re.fullmatch(r"tundish\[([a-z,]+)\]", requirement)
        names |= {name for inner in own[1].split(",") for name in extra_names(inner)} if own else {normal(requirement)}
    return names


CORE = {normal(requirement) for requirement in PROJECT["dependencies"]}


def test_packages_import_in_one_direction_only() -> None:
    allowed = {"converters": {"converters"}, "exporters": {"converters", "exporters"}}
    backwards = [
        str(found)
        for found in ALL
        if found.root in {*PACKAGES, "tests", "recipes"}
        and found.root not in allowed.get(found.file.relative_to(ROOT).parts[0], {*PACKAGES, "recipes"})
    ]
    assert not backwards


def test_exporters_do_not_import_one_another() -> None:
    folders = {path.parent.name for path in (ROOT / "exporters").glob("*/__init__.py")}
    assert len(folders) >= 4
    crossing = []
    for found in ALL:
        own, parts = container(found.file), found.module.split(".")
        if own and parts[0] == "exporters" and len(parts) > 1 and parts[1] in folders - {own}:
            crossing.append(str(found))
    assert not crossing


TORCH = "converters.torch_products"  # the one module that may import torch, imported when a device is asked for


def test_torch_is_imported_by_tests_and_one_module_only() -> None:
    homes = {str(found.file.relative_to(ROOT)) for found in ALL if found.root in {"torch", "torchvision", "optimum"}}
    assert homes == {TORCH.replace(".", "/") + ".py"}
    users = [found for found in ALL if found.module.startswith(TORCH)]
    assert users and not any(found.top for found in users)


def test_sdks_are_imported_by_their_own_exporter_only() -> None:
    homes = {
        "mlx": "mlx", "mlx_lm": "mlx", "onnx": "onnx", "onnxruntime": "onnx", "onnxruntime_genai": "onnx",
        "openvino": "openvino", "openvino_genai": "openvino", "openvino_tokenizers": "openvino", "xllamacpp": "gguf",
    }  # fmt: skip
    astray = [str(found) for found in ALL if found.root in homes and container(found.file) != homes[found.root]]
    assert not astray


def test_every_import_is_declared_and_every_core_dependency_is_used() -> None:
    # pydantic's own documentation imports from pydantic_core.
    distributions = {**importlib.metadata.packages_distributions(), "pydantic_core": ["pydantic"]}
    used: set[str] = set()
    undeclared = []
    for found in ALL:
        if found.root in {*PACKAGES, "recipes"} or found.root in sys.stdlib_module_names:
            continue
        names = {normal(name) for name in distributions.get(found.root, [found.root])}
        used |= names
        own = container(found.file)
        optional = ["reference", "plot", "datasets", "sign", "dask", "metrics"]
        extras = (
            [own] if own else ["torch"] if found.root == "torch" else [] if found.top and not found.typing else optional
        )
        declared = CORE.union(*map(extra_names, extras))
        if not names & declared:
            undeclared.append(str(found))
    assert not undeclared
    assert CORE - used == set()


def closure(requirement: Requirement, seen: set[tuple[str, str]]) -> Iterator[str]:
    """The names of all packages that an installed one brings on this platform."""
    for extra in requirement.extras or {""}:
        if (normal(requirement.name), extra) in seen:
            continue
        seen.add((normal(requirement.name), extra))
        yield normal(requirement.name)
        for line in importlib.metadata.requires(requirement.name) or []:
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": name}) for name in (extra, "")):
                yield from closure(inner, seen)


def test_no_other_extra_brings_torch() -> None:
    lines = [
        *PROJECT["dependencies"],
        *(line for extra in EXTRAS if extra not in ("all", "dev", "torch") for line in EXTRAS[extra]),
    ]
    declared = [one for one in map(Requirement, lines) if one.name != "tundish"]
    seen: set[tuple[str, str]] = set()
    try:
        brought = {
            name for one in declared if one.marker is None or one.marker.evaluate() for name in closure(one, seen)
        }
    except importlib.metadata.PackageNotFoundError as missing:
        pytest.skip(f"an extra is not installed here: {missing}")
    assert "numpy" in brought
    assert not brought & {"torch", "torchvision", "optimum"}


def test_lock_pins_every_declared_package() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values()), "no paths, no local versions"
    locked = {normal(name) for name in pins}
    declared = CORE | extra_names("all") | extra_names("dev") | {"pip", "setuptools"}
    assert declared - locked == set()
    assert "torchvision" not in locked, "PyPI's does not fit torch's CPU build, and transformers then fails to import"


def test_public_names_resolve() -> None:
    assert set(tundish.__all__) == set(tundish._HOMES)
    for name in tundish.__all__:
        assert getattr(tundish, name).__name__ == name
        assert name in dir(tundish)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tundish.no_such_name


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running code."""
    code += "\nimport json, sys\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_tundish_loads_nothing_else() -> None:
    assert not loaded_by("import tundish") & (SLOW_TO_IMPORT | {"numpy", "pydantic", "converters", "exporters"})


def test_listing_recipes_loads_nothing_slow() -> None:
    code = "import sys; sys.argv[1:] = ['recipes', '--json']\nfrom tundish.cli import app\napp(standalone_mode=False)"
    assert not loaded_by(code) & SLOW_TO_IMPORT


def test_no_sdk_is_loaded_before_its_exporter_is_used() -> None:
    """So that a build of one container needs no other container's runtime."""
    assert not loaded_by("import exporters.registry, tundish.doctor, tundish.inspection, tundish.job") & SDKS


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, cwd: Path = ROOT) -> str:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    run = subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@needs_make
def test_make_help_lists_every_recipe_and_target() -> None:
    listed = dict(re.findall(r"^  (\S+) +(\S.*)$", make("help"), re.MULTILINE))
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    targets = {"setup", "test", "test-all", "bench", "bench-memory", "bench-peers", "check", "format", "lock"}
    targets |= {"fuzz", "test-optimum", "schema", "wheel", "clean", "help"}
    assert recipes and set(listed) == recipes | targets


@needs_make
def test_make_passes_awkward_values_on_unchanged(tmp_path: Path) -> None:
    """A recipe's target hands MODEL and OUT to the command line as they are, and leaves out what was not given."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "some-recipe.yaml").touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    python = binaries / "python"
    python.write_text("#!/bin/sh\nprintf '<%s>\\n' \"$@\"\n", encoding="utf-8")
    python.chmod(0o755)
    done = ("-o", ".venv/.build-ready")
    model, out = '/models/it\'s a "model"; true', "an out folder/*"
    given = make(*done, "some-recipe", f"MODEL={model}", f"OUT={out}", "THREADS=2", cwd=tmp_path)
    assert given.splitlines() == [
        f"<{word}>"
        for word in ("-m", "tundish", "build", "some-recipe", "--model", model, "--out", out, "--threads", "2")
    ]
    plain = make(*done, "some-recipe", "MODEL=", "OUT=", "THREADS=", cwd=tmp_path)
    assert plain.splitlines() == ["<-m>", "<tundish>", "<build>", "<some-recipe>"]
