"""Recipes: what ships loads and says what it should; mistakes are told at their lines; merging obeys its laws."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.errors import UsageError
from converters.quantize.ggml.mixes import MIXES
from converters.quantize.scheme import SCHEMES, Scheme
from converters.role import Role
from exporters.base import Activations, Target
from exporters.options import OPTIONS, ExecutionProvider, OnnxOptions, OpenvinoDevice, OpenvinoOptions
from tundish import library, recipe_yaml
from tundish.library import LIBRARY, Summary, recipe_names, summaries
from tundish.recipe import (
    Device,
    Method,
    Recipe,
    json_schema,
    list_recipes,
    load_recipe,
    recipe_digest,
    resolved_yaml,
    schema_text,
)
from tundish.recipe_yaml import MAX_BYTES, MAX_VALUES, Json, Located, Problem, Where, merge, read_yaml

GGUF, ONNX, OPENVINO, MLX = Target.GGUF, Target.ONNX, Target.OPENVINO, Target.MLX

# name without the model's: device, targets, default scheme
SHIPPED = {
    "mobile-int4": (Device.MOBILE, {ONNX, GGUF, MLX}, "int4_g32"),
    "iot-int4": (Device.IOT, {GGUF, ONNX}, "int4_g32"),
    "aipc-int4": (Device.AI_PC, {OPENVINO}, "int4_g32"),
    "aipc-int8": (Device.AI_PC, {OPENVINO}, "int8_g32"),
    "aipc-long-int4": (Device.AI_PC, {OPENVINO}, "int4_g32"),
    "npu-int4": (Device.NPU, {OPENVINO}, "int4_g128"),
    "copilotpc-int4": (Device.COPILOT_PC, {ONNX}, "int4_g32"),
    "copilotpc-fp16": (Device.COPILOT_PC, {ONNX}, "fp16"),
    "cuda-fp16": (Device.CUDA, {ONNX}, "fp16"),
    "mac-int4": (Device.MAC, {MLX}, "int4_g32"),
    "mac-int8": (Device.MAC, {MLX}, "int8_g32"),
    "desktop-int4": (Device.DESKTOP, {GGUF}, "int4_g32"),
    "all-int4": (Device.ANY, {GGUF, ONNX, OPENVINO, MLX}, "int4_g32"),
    "all-fp16": (Device.ANY, {GGUF, ONNX, OPENVINO, MLX}, "fp16"),
    "all-fp32": (Device.ANY, {GGUF, ONNX, OPENVINO, MLX}, "fp32"),
}
FITTED = {"phi35-best-int4": "100%", "phi35-quality-int4": "120%"}
MIXES_SHIPPED = ["q2_k", "q3_k_m", "iq4_xs", "q4_k_m", "q5_k_m", "q6_k"]  # of Phi-3.5 for GGUF
SOURCES = {"phi35": "microsoft/Phi-3.5-mini-instruct", "phi4-mini": "microsoft/Phi-4-mini-instruct"}

GOOD = """\
description: a recipe
device: any
model:
  source: sample
context: 512
schemes:
  default: int4_g32
targets:
  gguf: {}
  onnx:
    accuracy_level: 1
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "mine.yaml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path | str) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert caught.value.exit_status == 2
    return str(caught.value)


# What ships


def test_every_asked_for_recipe_ships_and_no_other() -> None:
    mixes = [f"phi35-gguf-{mix}" for mix in MIXES_SHIPPED]
    assert recipe_names() == sorted([*(f"{model}-{name}" for model in SOURCES for name in SHIPPED), *mixes, *FITTED])


@pytest.mark.parametrize("model", SOURCES)
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe(model: str, name: str) -> None:
    recipe = load_recipe(f"{model}-{name}")
    device, targets, scheme = SHIPPED[name]
    assert recipe.name == f"{model}-{name}"
    assert recipe.model.source == SOURCES[model]
    assert recipe.model.revision == "main"
    assert (recipe.device, set(recipe.targets), recipe.schemes.default) == (device, targets, SCHEMES[scheme])
    assert set(recipe.verify.required) == targets
    for target, options in recipe.targets.items():
        assert type(options) is OPTIONS[target]
        gates = recipe.verify.for_target(target).gates
        assert gates.kl is not None and gates.top1 is not None
        assert gates.tokens == 0, "what a container cannot hold is declared, and no share of texts stands for it"
        assert gates.codes_equal and gates.stops
        assert gates.longrope_boundary


def test_listing_has_distinct_descriptions_for_one_model() -> None:
    phi35 = [recipe for recipe in list_recipes() if recipe.name.startswith("phi35-")]
    assert (
        len({recipe.description for recipe in phi35}) == len(phi35) == len(SHIPPED) + len(MIXES_SHIPPED) + len(FITTED)
    )


@pytest.mark.parametrize(("name", "budget"), FITTED.items())
def test_fitted_recipe(name: str, budget: str) -> None:
    """Uniform int4 is what the budget is a share of, and every container has to pass."""
    recipe = load_recipe(name)
    assert recipe.schemes.default is SCHEMES["int4_g32"] and set(recipe.verify.required) == set(recipe.targets) == set(
        OPTIONS
    )
    assert {scheme.name for scheme in recipe.schemes.overrides.values()} == {"int8_g32"}
    assert recipe.budget is not None and recipe.budget.size == budget and not recipe.budget.fixed
    assert recipe.method is Method.BEST and recipe.settled_method is Method.GPTQ and recipe.calibration.source.is_text


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("source", ["text", "random-tokens", "none"])
def test_best_is_what_there_is_for_what_the_model_reads(method: Method, source: str) -> None:
    path = write(GOOD + f"method: {method}\ncalibration: {{source: {source}}}\n")
    if source == "text" or method in (Method.RTN, Method.HQQ, Method.BEST):
        found = load_recipe(path).settled_method
        assert found is ((Method.GPTQ if source == "text" else Method.RTN) if method is Method.BEST else method)
    else:
        with pytest.raises(UsageError, match=f"{re.escape(method)} needs text"):
            load_recipe(path)


@pytest.mark.parametrize("mix", MIXES_SHIPPED)
def test_shipped_mix(mix: str) -> None:
    recipe = load_recipe(f"phi35-gguf-{mix}")
    assert recipe.model.source == SOURCES["phi35"] and recipe.context == 4096
    assert recipe.schemes.default is MIXES[mix] and not recipe.schemes.overrides
    assert set(recipe.targets) == set(recipe.verify.required) == {GGUF}
    gates = recipe.verify.for_target(GGUF).gates
    assert gates.kl is not None and gates.top1 is not None and gates.tokens == 0 and gates.codes_equal
    assert gates.kl < 1 and gates.top1 > 0.5


def test_a_better_mix_has_stricter_gates() -> None:
    gates = [load_recipe(f"phi35-gguf-{mix}").verify.gates for mix in MIXES_SHIPPED if mix != "iq4_xs"]
    for worse, better in itertools.pairwise(gates):
        assert worse.kl is not None and better.kl is not None and better.kl < worse.kl
        assert worse.top1 is not None and better.top1 is not None and better.top1 > worse.top1


def test_a_name_of_a_mix_and_of_a_type_is_the_mix_as_default_and_the_type_as_override() -> None:
    recipe = load_recipe(write(GOOD.replace("default: int4_g32", "default: q6_k\n  overrides: {lm_head: q6_k}")))
    assert recipe.schemes.default is MIXES["q6_k"]
    assert recipe.schemes.overrides == {Role.LM_HEAD: SCHEMES["q6_k"]}
    again = Recipe.model_validate(recipe.model_dump(mode="json"))
    assert again.schemes.default is MIXES["q6_k"]


def test_a_mix_is_no_override_and_a_type_without_a_mix_may_be_the_default() -> None:
    assert load_recipe(write(GOOD.replace("int4_g32", "q4_k"))).schemes.default is SCHEMES["q4_k"]
    told = message(write(GOOD.replace("int4_g32", "q4_k_m\n  overrides: {lm_head: q4_k_m}")))
    assert "mine.yaml:8" in told and "lm_head" in told and "q6_k" in told
    assert "q4_k_m" in message(write(GOOD.replace("int4_g32", "q4_k_x")))


@pytest.mark.parametrize("model", SOURCES)
def test_contexts_past_4096_are_for_long_text_alone(model: str) -> None:
    for name in SHIPPED:
        context = load_recipe(f"{model}-{name}").context
        assert isinstance(context, int) and (context > 4096) == ("long" in name)


@pytest.mark.parametrize("model", SOURCES)
def test_int4_recipes_keep_embedding_and_head_in_int8(model: str) -> None:
    for name in SHIPPED:
        schemes = load_recipe(f"{model}-{name}").schemes
        if name.endswith("int4"):
            assert schemes.overrides.keys() == {Role.EMBEDDING, Role.LM_HEAD}
            assert {scheme.bits for scheme in schemes.overrides.values()} == {8}
        assert isinstance(schemes.default, Scheme) and schemes.default.symmetric


@pytest.mark.parametrize("model", SOURCES)
def test_target_options_of_shipped_recipes(model: str) -> None:
    onnx = {name: load_recipe(f"{model}-{name}").targets.get(ONNX) for name in SHIPPED}
    assert onnx["mobile-int4"] == OnnxOptions(accuracy_level=4)
    for name in ("copilotpc-int4", "copilotpc-fp16"):
        assert onnx[name] == OnnxOptions(execution_provider=ExecutionProvider.DML, activations=Activations.FP16)
    assert onnx["cuda-fp16"] == OnnxOptions(execution_provider=ExecutionProvider.CUDA, activations=Activations.FP16)
    for name in ("all-int4", "all-fp32"):
        options = load_recipe(f"{model}-{name}").targets.values()
        assert {option.activations for option in options} == {Activations.FP32}
    cpu_gpu = OpenvinoOptions(devices=(OpenvinoDevice.CPU, OpenvinoDevice.GPU))
    assert load_recipe(f"{model}-aipc-int8").targets == {OPENVINO: cpu_gpu}
    assert load_recipe(f"{model}-npu-int4").targets == {OPENVINO: OpenvinoOptions(devices=(OpenvinoDevice.NPU,))}


def test_override_for_one_target_keeps_the_rest() -> None:
    verify = load_recipe("phi35-mobile-int4").verify
    gguf, mlx = verify.for_target(GGUF), verify.for_target(MLX)
    assert mlx.text.sequences * mlx.text.length < gguf.text.sequences * gguf.text.length
    assert mlx.gates.tokens == gguf.gates.tokens and mlx.answer == gguf.answer


def test_gates_and_time_limit_can_be_overridden_for_a_target() -> None:
    path = write(
        GOOD
        + "verify:\n  gates: {kl: 0.3, top1: 0.6}\n  overrides:\n"
        + "    onnx: {time_limit: 60, gates: {kl: 0.5, stops: false}}\n"
    )
    verify = load_recipe(path).verify
    assert verify.for_target(GGUF).gates.kl == 0.3 and verify.for_target(GGUF).time_limit == 1800
    onnx = verify.for_target(ONNX)
    assert (onnx.gates.kl, onnx.gates.top1, onnx.gates.stops, onnx.time_limit) == (0.5, 0.6, False, 60)


def test_reading_recipes_imports_no_sdk() -> None:
    code = (
        "import sys; from tundish.recipe import list_recipes; assert list_recipes();"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'openvino', 'mlx', 'gguf', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=LIBRARY.parent)


def test_the_listing_and_the_help_import_no_more_than_they_show() -> None:
    code = (
        "import sys; from tundish.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as ending:\n    assert not ending.code, ending.code\n"
        "heavy = {'numpy', 'pydantic', 'rich', 'numba', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for arguments in (["recipes"], ["recipes", "--json"], ["--help"], ["build", "--help"], ["--version"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=LIBRARY.parent, capture_output=True)


def test_the_listing_says_what_the_recipes_say() -> None:
    assert list(summaries()) == [
        Summary(
            recipe.name,
            recipe.device,
            tuple(recipe.targets),
            recipe.schemes.default.name,
            recipe.context,
            recipe.description,
        )
        for recipe in list_recipes()
    ]


BROKEN = {
    "no description": GOOD.replace("description: a recipe\n", ""),
    "no default scheme": GOOD.replace("default: int4_g32", "overrides: {lm_head: fp16}"),
    "targets of the wrong kind": GOOD.replace("gguf: {}\n  onnx:\n    accuracy_level: 1", "[gguf, onnx]"),
    "unknown target": GOOD.replace("gguf: {}", "gguff: {}"),
    "key twice": GOOD + "device: any\n",
    "not YAML": GOOD + "verify: {",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_packaged_recipe_that_has_no_row_to_show_is_told(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = message(write(BROKEN[case]))
    assert "mine.yaml:" in expected
    monkeypatch.setattr(library, "LIBRARY", Path())
    with pytest.raises(UsageError, match=re.escape(expected)):
        list(summaries())


def test_every_file_is_parsed_once_in_a_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def read_and_count(path: Path, problems: list[Problem]) -> Located:
        read.append(os.path.relpath(path, LIBRARY))
        return read_yaml(path, problems)

    monkeypatch.setattr(recipe_yaml, "read_yaml", read_and_count)
    for listing in (list_recipes, lambda: list(summaries())):
        read.clear()
        assert listing()
        assert len(read) == len(set(read)) and "base/phi35.yaml" in read


# Resolved form, digest, schema


@pytest.mark.parametrize("name", recipe_names())
def test_resolved_yaml_reads_back_as_the_same_recipe(name: str) -> None:
    recipe = load_recipe(name)
    again = load_recipe(write(resolved_yaml(recipe), f"{name}.yaml"))
    assert again == recipe
    assert recipe_digest(again) == recipe_digest(recipe)
    assert resolved_yaml(again) == resolved_yaml(recipe)


def test_digest_sees_values_and_not_layout() -> None:
    recipe = load_recipe(write(GOOD))
    reordered = load_recipe(
        write("# a comment\n" + GOOD.replace("description: a recipe\n", "") + "description: a recipe")
    )
    assert recipe_digest(reordered) == recipe_digest(recipe)
    assert re.fullmatch("[0-9a-f]{64}", recipe_digest(recipe))
    assert recipe_digest(load_recipe(write(GOOD.replace("512", "513")))) != recipe_digest(recipe)
    assert len({recipe_digest(each) for each in list_recipes()}) == len(recipe_names())


def test_schema_file_is_current() -> None:
    path = LIBRARY / "recipe.schema.json"
    mend = "from tundish.recipe import LIBRARY, schema_text; (LIBRARY / 'recipe.schema.json').write_text(schema_text())"
    assert path.read_text(encoding="utf-8") == schema_text(), f"run: python -c {mend!r}"


def test_schema_accepts_what_ships_and_refuses_mistakes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from ruamel.yaml import YAML

    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in LIBRARY.glob("*.yaml"):
        document = YAML(typ="safe").load(path)
        assert validator.is_valid(document), path
        assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    for recipe in list_recipes():
        assert validator.is_valid(json.loads(json.dumps(YAML(typ="safe").load(resolved_yaml(recipe)))))
    good = {"extends": "phi35-all-int4", "description": None, "schemes": {"default": "int8_g32"}}
    assert validator.is_valid(good)
    assert validator.is_valid({**good, "verify": {"required": ["gguf"], "gates": {"kl": None}}})
    for bad in (
        {"schemes": {"default": "int8_g33"}},
        {"schemes": {"defualt": "int8_g32"}},
        {"schemes": {"overrides": {"norm": "fp16"}}},
        {"context": 0},
        {"verify": {"required": ["ggml"]}},
        {"targets": {"onnx": {"accuracy_level": 2}}},
    ):
        assert not validator.is_valid({**good, **bad}), bad
    assert not validator.is_valid({"description": "neither extends nor complete"})


# Mistakes, at their lines

MISTAKES = {
    "unknown key at the top": (
        GOOD + "contxt: 3\n",
        "unknown key 'contxt' (mine.yaml:12); expected one of extends, name, description, device, model, context, "
        "schemes, method, calibration, budget, targets, verify. Did you mean context?",
    ),
    "unknown target": (
        GOOD.replace("gguf: {}", "gguff: {}"),
        "unknown key 'gguff' in targets (mine.yaml:9); expected one of gguf, onnx, openvino, mlx. Did you mean gguf?",
    ),
    "unknown option of a target": (
        GOOD.replace("accuracy_level: 1", "acuracy_level: 1"),
        "unknown key 'acuracy_level' in targets.onnx (mine.yaml:11); expected one of activations, execution_provider, "
        "accuracy_level. Did you mean accuracy_level?",
    ),
    "option of another target": (
        GOOD.replace("gguf: {}", "gguf: {devices: [cpu]}"),
        "unknown key 'devices' in targets.gguf (mine.yaml:9); expected one of activations.",
    ),
    "unknown role": (
        GOOD.replace("  default: int4_g32", "  default: int4_g32\n  overrides:\n    mlp_dwn: int8_g32"),
        "unknown key 'mlp_dwn' in schemes.overrides (mine.yaml:9); expected one of embedding, lm_head, attn_q, attn_k, "
        "attn_v, attn_output, mlp_gate, mlp_up, mlp_down. Did you mean mlp_down?",
    ),
    "a norm has no scheme": (
        GOOD.replace("  default: int4_g32", "  default: int4_g32\n  overrides: {norm: fp16}"),
        "unknown key 'norm' in schemes.overrides (mine.yaml:8); expected one of embedding, lm_head, attn_q, attn_k, "
        "attn_v, attn_output, mlp_gate, mlp_up, mlp_down.",
    ),
    "unknown scheme": (
        GOOD.replace("int4_g32", "int4_g33"),
        "wrong value for schemes.default (mine.yaml:7); expected one of " + ", ".join({**SCHEMES, **MIXES}) + "; found "
        "'int4_g33'. Did you mean int4_g32?",
    ),
    "unknown scheme in a flow mapping": (
        GOOD.replace("  default: int4_g32", "  default: int4_g32\n  overrides: {lm_head: 8}"),
        "wrong value for schemes.overrides.lm_head (mine.yaml:8); expected one of " + ", ".join(SCHEMES) + "; found 8.",
    ),
    "unknown device": (
        GOOD.replace("any", "phone"),
        "wrong value for device (mine.yaml:2); expected 'mobile', 'iot', 'ai-pc', 'npu', 'copilot-pc', 'cuda', 'mac', "
        "'desktop' or 'any'; found 'phone'.",
    ),
    "context of the wrong kind": (
        GOOD.replace("512", "ful"),
        "wrong value for context (mine.yaml:5); expected a whole number or 'full'; found 'ful'. Did you mean full?",
    ),
    "context out of range": (
        GOOD.replace("512", "0"),
        "wrong value for context (mine.yaml:5); expected 1 or more or 'full'; found 0.",
    ),
    "a number in quotes": (
        GOOD.replace("512", "'512'"),
        "wrong value for context (mine.yaml:5); expected a whole number or 'full'; found '512'.",
    ),
    "true is no number": (
        GOOD + "verify: {time_limit: true}\n",
        "wrong value for verify.time_limit (mine.yaml:12); expected a whole number; found true.",
    ),
    "yes is no truth value in YAML 1.2": (
        GOOD + "verify:\n  enabled: yes\n",
        "wrong value for verify.enabled (mine.yaml:13); expected true or false; found 'yes'.",
    ),
    "infinite gate": (
        GOOD + "verify:\n  gates:\n    kl: .inf\n",
        "wrong value for verify.gates.kl (mine.yaml:14); expected a finite number; found inf.",
    ),
    "share above one": (
        GOOD + "verify:\n  gates:\n    top1: 68\n",
        "wrong value for verify.gates.top1 (mine.yaml:14); expected 1 or less; found 68.",
    ),
    "a commit that reads as a number": (
        GOOD.replace("source: sample", "source: sample\n  revision: 1234567"),
        "wrong value for model.revision (mine.yaml:5); expected text; found 1234567. Put it in quotes.",
    ),
    "mapping expected": (
        GOOD.replace("model:\n  source: sample", "model: sample"),
        "wrong value for model (mine.yaml:3); expected keys with values; found 'sample'.",
    ),
    "mapping of targets expected": (
        GOOD.replace("gguf: {}\n  onnx:\n    accuracy_level: 1", "[gguf, onnx]"),
        "wrong value for targets (mine.yaml:8); expected keys with values; found a list.",
    ),
    "no target": (
        GOOD[: GOOD.index("targets")] + "targets: {}\n",
        "wrong value for targets (mine.yaml:8); expected at least 1 of them; found keys with values.",
    ),
    "missing key": (GOOD.replace("device: any\n", ""), "missing key 'device' (mine.yaml:1)."),
    "missing inner key": (
        GOOD.replace("source: sample", "revision: main"),
        "missing key 'source' in model (mine.yaml:3).",
    ),
    "list item": (
        GOOD + "verify:\n  required:\n    - gguf\n    - gguff\n",
        "wrong value for verify.required.1 (mine.yaml:15); expected 'gguf', 'onnx', 'openvino' or 'mlx'; "
        "found 'gguff'. Did you mean gguf?",
    ),
    "an importance matrix without a file": (
        GOOD + "calibration:\n  source: imatrix\n",
        "calibration by an importance matrix needs its file (mine.yaml:13); expected calibration.file.",
    ),
    "a file that nothing reads": (
        GOOD + "calibration:\n  source: random-tokens\n  file: i.gguf\n",
        "calibration.file is not used (mine.yaml:14); expected source imatrix; found random-tokens.",
    ),
    "a text that nothing reads": (
        GOOD + "calibration:\n  text: mine.txt\n",
        "calibration.text is not used (mine.yaml:13); expected source text; found none.",
    ),
    "gptq without text": (
        GOOD + "method: gptq\ncalibration:\n  source: random-tokens\n",
        "gptq needs text to learn from (mine.yaml:12); expected calibration: {source: text}; found random-tokens.",
    ),
    "required but not made": (
        GOOD + "verify:\n  required: [gguf, mlx]\n",
        "required target that the recipe does not make (mine.yaml:13); expected some of gguf, onnx; an inherited list "
        "is replaced by a new one; found mlx.",
    ),
    "text longer than the context": (
        GOOD + "verify:\n  text: {length: 600}\n  overrides:\n    onnx: {text: {length: 512}}\n",
        "evaluation text longer than the context (mine.yaml:13); expected at most the context, 512 tokens; found 600.",
    ),
    "text of one target longer than the context": (
        GOOD + "verify:\n  overrides:\n    onnx:\n      text: {length: 513}\n",
        "evaluation text longer than the context (mine.yaml:15); expected at most the context, 512 tokens; found 513.",
    ),
    "unknown target in overrides": (
        GOOD + "verify:\n  overrides:\n    onx: {}\n",
        "unknown key 'onx' in verify.overrides (mine.yaml:14); expected one of gguf, onnx, openvino, mlx. "
        "Did you mean onnx?",
    ),
    "name of another file": (
        "name: other\n" + GOOD,
        "name is not the file's (mine.yaml:1); expected mine; found 'other'. Leave the key out or rename the file.",
    ),
    "no value": (
        GOOD.replace("gguf: {}", "gguf:"),
        "'gguf' has no value (mine.yaml:9). Write {} if it is to hold the defaults; no value removes an inherited key, "
        "and none is.",
    ),
    "duplicate key": (
        GOOD + "device: mac\n",
        "duplicate key 'device' (mine.yaml:12); expected each key once; found it first in line 2.",
    ),
    "merge key": (
        GOOD.replace("gguf: {}", "gguf: {}\n  <<: {mlx: {}}"),
        "unknown key '<<' in targets (mine.yaml:10); expected one of gguf, onnx, openvino, mlx.",
    ),
    "key that is no text": (
        GOOD + "[a]: 1\n",
        "not a key (mine.yaml:12); expected text; found a list.",
    ),
    "tag": (
        GOOD.replace("gguf: {}", "gguf: !!python/object:os.system {}"),
        "unknown YAML tag tag:yaml.org,2002:python/object:os.system (mine.yaml:9); expected a plain value.",
    ),
    "list": ("- 1\n", "not a recipe (mine.yaml:1); expected lines of `key: value`; found a list."),
    "unclosed bracket": (
        GOOD + "verify: {enabled: [\n",
        "not valid YAML: expected the node content, but found '<stream end>' (mine.yaml:13).",
    ),
    "tab": (GOOD + "\tx: 1\n", "not valid YAML: found character '\\t' that cannot start any token (mine.yaml:12)."),
    "two documents": (
        GOOD + "---\na: 1\n",
        "not valid YAML: but found another document (mine.yaml:12).",
    ),
    "control character": (GOOD + "a: \x01\n", "not valid YAML: control character (mine.yaml:12); found U+0001."),
    "undefined alias": (GOOD + "verify: *nothing\n", "not valid YAML: found undefined alias 'nothing' (mine.yaml:12)."),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake(case: str) -> None:
    text, expected = MISTAKES[case]
    assert message(write(text)) == expected


def test_all_mistakes_at_once_in_order_of_lines() -> None:
    text = GOOD.replace("any", "phone").replace("int4_g32", "int5").replace("gguf: {}", "gguf:") + "device: mac\nx: 1\n"
    told = message(write(text))
    assert told.startswith("5 problems in the recipe: (1) wrong value for device (mine.yaml:2); ")
    assert re.findall(r"\((\d)\)[^(]*\(mine.yaml:(\d+)\)", told) == [
        ("1", "2"), ("2", "7"), ("3", "9"), ("4", "12"), ("5", "13"),
    ]  # fmt: skip
    assert "\n" not in told


def test_not_utf8() -> None:
    path = write(GOOD)
    path.write_bytes(path.read_bytes() + b"name: caf\xe9\n")
    assert message(path) == "not UTF-8 text (mine.yaml:12); found byte 0xe9."


def test_byte_order_mark_and_windows_line_ends_are_fine() -> None:
    path = write(GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe(path) == load_recipe(write(GOOD, "there/mine.yaml"))


def test_aliases_may_repeat_but_not_explode() -> None:
    text = GOOD.replace("gguf: {}", "gguf: &common {activations: fp32}\n  mlx: *common")
    assert load_recipe(write(text)).targets[MLX].activations is Activations.FP32
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    assert f"at most {MAX_VALUES} values, aliases included" in message(write(bomb))
    assert "at most 32 levels of nesting" in message(write("a: &a [*a]\n"))
    assert message(write("a: 1\nb: " + "[" * 20_000)).startswith("not a recipe (mine.yaml:2); expected at most 32")
    for levels in (31, 32):  # the outermost mapping is one more
        told = message(write("a: 1\nb: " + "[" * levels + "]" * levels + "\n"))
        assert ("at most 32 levels of nesting" in told) == (levels == 32)


def test_a_file_that_is_no_recipe_by_its_size() -> None:
    assert f"expected at most {MAX_BYTES} bytes" in message(write("#" * MAX_BYTES + "\n"))


def test_a_number_that_python_does_not_read() -> None:
    told = message(write(GOOD.replace("512", "9" * 5000)))
    assert f"(1) not a value of YAML's type int (mine.yaml:5); found '{'9' * 40}' and 4960 characters more." in told


def test_a_mapping_is_no_scheme() -> None:
    told = message(write(GOOD.replace("default: int4_g32", "default: int4_g32\n  overrides: {embedding: {}}")))
    assert "expected one of fp32, " in told and "(mine.yaml:" in told


def test_dates_are_text() -> None:
    path = write(GOOD.replace("source: sample", "source: sample\n  revision: 2024-08-01"))
    assert load_recipe(path).model.revision == "2024-08-01"


DAMAGE = (
    """{} [] [1] {a:1} {a: 1} -1 1e400 .nan '' *a &a !!int !!bool !!set 2001-99-99 ? % @ ` | - --- ... { ] " <<: full"""
)
VALUES = st.sampled_from([*DAMAGE.split(), "", "!!int x", "!!bool x", "extends: mine", "\t", "\x00", "\ufeff"])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(recipe_names()), st.data())
def test_any_damage_to_a_recipe_is_told_with_a_line(name: str, data: st.DataObject) -> None:
    lines = resolved_yaml(load_recipe(name)).splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(lines) - 1))
        lines[number] = lines[number].split(":")[0] + data.draw(st.sampled_from([": ", ""])) + data.draw(VALUES)
    path = write("\n".join(lines) + "\n", f"{name}.yaml")
    try:
        load_recipe(path)
    except UsageError as error:
        assert re.search(rf"{name}\.yaml:\d+\)", str(error))


# Finding recipes


def test_unknown_name() -> None:
    told = message("phi35-mobil-int4")
    assert told.startswith("unknown recipe 'phi35-mobil-int4' (did you mean phi35-mobile-int4?); expected one of ")
    assert told.endswith("A recipe of your own is given by its path, such as ./phi35-mobil-int4.yaml.")


def test_missing_file_and_folder() -> None:
    assert message("./nothing.yaml") == "no such recipe file (./nothing.yaml)."
    Path("folder.yaml").mkdir()
    assert message("folder.yaml") == "no such recipe file (folder.yaml)."


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file() -> None:
    path = write(GOOD)
    path.chmod(0)
    assert message(path) == "cannot read the recipe: Permission denied (mine.yaml)."


def test_a_base_is_no_recipe() -> None:
    assert message(LIBRARY / "base" / "phi35.yaml").count("missing key") == 4


# Inheritance


def test_extends_a_packaged_recipe_by_name() -> None:
    path = write("extends: phi35-desktop-int4\ndescription: mine\nmodel: {source: sample}\n")
    recipe, base = load_recipe(path), load_recipe("phi35-desktop-int4")
    assert recipe.name == "mine" and recipe.model.source == "sample"
    assert recipe.schemes == base.schemes and recipe.verify == base.verify


def test_a_file_may_extend_the_packaged_recipe_of_its_own_name() -> None:
    path = write("extends: phi35-desktop-int4\ncontext: 1024\n", "phi35-desktop-int4.yaml")
    assert load_recipe(path).context == 1024
    assert load_recipe("phi35-desktop-int4").context == 4096


def test_extends_a_relative_path() -> None:
    write(GOOD, "bases/good.yaml")
    assert load_recipe(write("extends: ../bases/good.yaml\n", "mine/mine.yaml")).context == 512


def test_a_file_beside_comes_before_a_packaged_one() -> None:
    write(GOOD, "phi35-desktop-int4.yaml")
    assert load_recipe(write("extends: phi35-desktop-int4\n")).context == 512


def test_null_removes_and_lists_are_replaced() -> None:
    write(GOOD + "verify:\n  required: [gguf, onnx]\n  gates: {kl: 0.1, top1: 0.9}\n", "good.yaml")
    recipe = load_recipe(
        write("extends: good\ntargets: {onnx: null}\nverify:\n  required: [gguf]\n  gates:\n    kl:\n")
    )
    assert set(recipe.targets) == {GGUF}
    assert recipe.verify.required == (GGUF,)
    assert (recipe.verify.gates.kl, recipe.verify.gates.top1) == (None, 0.9)


def test_lines_refer_to_the_file_that_holds_the_key() -> None:
    write(GOOD.replace("int4_g32", "int4"), "bases/good.yaml")
    child = write("extends: bases/good\ncontext: 256\nverify:\n  gates: {kll: 1}\n")
    told = message(child)
    assert told.startswith("2 problems in the recipe: (1) wrong value for schemes.default (bases/good.yaml:7); ")
    assert "(2) unknown key 'kll' in verify.gates (mine.yaml:4); " in told
    told = message(write("extends: bases/good\nschemes: {default: fp16}\nmodel: {source: null}\n"))
    assert told == "missing key 'source' in model (mine.yaml:3)."


def test_removing_what_is_not_inherited() -> None:
    write(GOOD, "good.yaml")
    assert message(write("extends: good\ntargets:\n  mlx:\n")).startswith("'mlx' has no value (mine.yaml:3).")


def test_circles() -> None:
    write("extends: b\n", "a.yaml")
    write("extends: ./c.yaml\n", "b.yaml")
    write("description: x\nextends: a\n", "c.yaml")
    assert message("a.yaml") == (
        "recipes extend one another in a circle (c.yaml:2); found a.yaml -> b.yaml -> c.yaml -> a.yaml."
    )
    assert message(write("extends: mine\n")) == (
        "recipes extend one another in a circle (mine.yaml:1); found mine.yaml -> mine.yaml."
    )


def test_missing_base() -> None:
    assert message(write("device: any\nextends: nothing\n")) == (
        f"extends a recipe that does not exist: 'nothing' (mine.yaml:2); expected a file nothing.yaml or "
        f"{LIBRARY / 'nothing.yaml'}."
    )
    assert message(write("extends: [a]\n")) == (
        "wrong value for extends (mine.yaml:1); expected the name or path of a recipe; found ['a']."
    )


# The laws of merging

HERE = Where("a.yaml", 1)
KEYS = st.sampled_from("abcd")
SCALARS = st.one_of(st.integers(0, 3), st.booleans(), st.sampled_from(["x", "y"]))


def located(value: Json) -> Located:
    if isinstance(value, dict):
        return Located({key: located(inner) for key, inner in value.items()}, HERE)
    if isinstance(value, list):
        return Located(tuple(located(inner) for inner in value), HERE)
    return Located(value, HERE)


def trees(leaves: st.SearchStrategy[Json]) -> st.SearchStrategy[Located]:
    values = st.recursive(leaves, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=12)
    return st.dictionaries(KEYS, values, max_size=4).map(located)


FULL = trees(SCALARS | st.lists(SCALARS, max_size=2))
WITH_NULLS = trees(SCALARS | st.none())
NOTHING = located({})


def merged(base: Located, over: Located) -> Located:
    problems: list[Problem] = []
    result = merge(base, over, problems)
    assert not problems
    return result


@settings(deadline=None)
@given(FULL)
def test_merging_with_nothing_or_itself_changes_nothing(tree: Located) -> None:
    assert merged(NOTHING, tree) == merged(tree, NOTHING) == merged(tree, tree) == tree


@settings(deadline=None)
@given(FULL, FULL, FULL)
def test_merging_is_associative(a: Located, b: Located, c: Located) -> None:
    # Not where b replaces a mapping of a by a value and c that value by a mapping: the last one then starts afresh.
    if _same_kinds(a, b) and _same_kinds(b, c) and _same_kinds(a, c):
        assert merged(merged(a, b), c) == merged(a, merged(b, c))


def _same_kinds(a: Located, b: Located) -> bool:
    if not isinstance(a.value, dict) or not isinstance(b.value, dict):
        return isinstance(a.value, dict) == isinstance(b.value, dict)
    return all(_same_kinds(a.value[key], b.value[key]) for key in a.value.keys() & b.value.keys())


@settings(deadline=None)
@given(FULL, FULL)
def test_the_upper_file_wins_and_the_rest_stays(base: Located, over: Located) -> None:
    result = merged(base, over)
    assert isinstance(result.value, dict) and isinstance(base.value, dict) and isinstance(over.value, dict)
    assert result.value.keys() == base.value.keys() | over.value.keys()
    for key, entry in result.value.items():
        if key not in over.value:
            assert entry == base.value[key]
        elif not isinstance(over.value[key].value, dict):
            assert entry == over.value[key]


@settings(deadline=None)
@given(WITH_NULLS, WITH_NULLS)
def test_no_null_survives_and_each_one_removes_or_is_told(base: Located, over: Located) -> None:
    base = merge(NOTHING, base, [])
    before, problems = base.plain(), list[Problem]()
    result = merge(base, over, problems)
    assert not _has_null(result.plain())
    assert base.plain() == before
    assert isinstance(over.value, dict) and isinstance(base.value, dict)
    untold = [key for key, entry in over.value.items() if entry.value is None and key not in base.value]
    assert set(untold) <= {problem.what.split("'")[1] for problem in problems}


def _has_null(value: Json) -> bool:
    if isinstance(value, dict):
        return any(_has_null(inner) for inner in value.values())
    return value is None


def test_a_recipe_can_be_made_in_code() -> None:
    recipe = load_recipe("phi35-all-int4")
    fields = {name: getattr(recipe, name) for name in Recipe.model_fields}
    assert Recipe(**fields) == recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.context = 1
