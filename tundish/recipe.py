"""Recipes: what to make of a model for one class of devices, and what must hold before it is published.

A recipe is a YAML file (`recipe_yaml` reads it) checked against the models below. Strings of the file become enums and
schemes here and nowhere else.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    WithJsonSchema,
    create_model,
)
from ruamel.yaml import YAML

from converters.errors import UsageError
from converters.quantize.ggml.mixes import MIXES, Mix
from converters.quantize.scheme import SCHEMES, Scheme
from converters.role import Role
from exporters.options import OPTIONS, TargetOptions
from exporters.target import Target
from tundish.budget_size import EXPECTED, PATTERN, BudgetSize, parse_budget
from tundish.library import LIBRARY, NOT_INHERITED, recipe_names
from tundish.recipe_errors import locate, problems_of
from tundish.recipe_yaml import SUFFIX, Files, Json, Located, Problem, Where, raise_all, resolve


class Device(StrEnum):
    """The class of devices a recipe is for. Says nothing to the exporters; it sorts the recipes for people."""

    MOBILE = "mobile"
    IOT = "iot"
    AI_PC = "ai-pc"
    NPU = "npu"
    COPILOT_PC = "copilot-pc"
    CUDA = "cuda"
    MAC = "mac"
    DESKTOP = "desktop"
    ANY = "any"


def _scheme(name: object) -> Scheme:
    if isinstance(name, Scheme):
        return name
    if not isinstance(name, str) or name not in SCHEMES:
        is_mix = isinstance(name, str) and name in MIXES
        raise ValueError(("a scheme, no mix: " if is_mix else "one of ") + ", ".join(SCHEMES))
    return SCHEMES[name]


_DEFAULTS: dict[str, Scheme | Mix] = {**SCHEMES, **MIXES}  # a name that is both, such as q6_k, means the mix here


def _default(name: object) -> Scheme | Mix:
    if isinstance(name, Scheme | Mix):
        return name
    if not isinstance(name, str) or name not in _DEFAULTS:
        meant = str(name).lower()
        raise ValueError(f"{meant}, in lower case" if meant in _DEFAULTS else "one of " + ", ".join(_DEFAULTS))
    return _DEFAULTS[name]


DefaultName = Annotated[
    Scheme | Mix,
    PlainValidator(_default),
    PlainSerializer(lambda scheme: scheme.name, return_type=str),
    WithJsonSchema({"type": "string", "enum": list(_DEFAULTS)}),
]
SchemeName = Annotated[
    Scheme,
    PlainValidator(_scheme),
    PlainSerializer(lambda scheme: scheme.name, return_type=str),
    WithJsonSchema({"type": "string", "enum": list(SCHEMES)}),
]
Count = Annotated[int, Field(strict=True, ge=1)]
Text = Annotated[str, Field(min_length=1)]
Flag = Annotated[bool, Field(strict=True)]
Nats = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _keyed(title: str, kinds: Mapping[str, object]) -> type[BaseModel]:
    """A model whose optional keys are those of a table: its errors and its schema name each key."""
    fields: dict[str, Any] = {key: (kind, None) for key, kind in kinds.items()}  # Any: so typed by pydantic
    return create_model(title, __config__=ConfigDict(extra="forbid"), **fields)


_OverridesFile = _keyed("Overrides", {role.value: SchemeName for role in Role if role is not Role.NORM})
_TargetsFile = _keyed("Targets", {target.value: options for target, options in OPTIONS.items()})


def _overrides(data: object) -> dict[Role, Scheme]:
    if isinstance(data, Mapping):
        data = {key.value if isinstance(key, Role) else key: value for key, value in data.items()}
    checked = _OverridesFile.model_validate(data)
    return {role: getattr(checked, role.value) for role in Role if role.value in checked.model_fields_set}


def _targets(data: object) -> dict[Target, TargetOptions]:
    return _by_target(_TargetsFile.model_validate(data))


def _by_target(checked: BaseModel) -> dict[Target, Any]:
    return {target: getattr(checked, target.value) for target in OPTIONS if target.value in checked.model_fields_set}


class ModelSource(_Part):
    """Where the checkpoint comes from when the command line does not say."""

    source: Text = Field(description="a Hugging Face id, the path of a folder, or 'sample'")
    revision: Text | None = Field(
        default=None, description="branch, tag or commit on the Hub; the manifest records the commit"
    )


class Schemes(_Part):
    """How matrices are stored. Norms stay floats and have no scheme of their own.

    A default may name a mix of llama.cpp's block types (q4_k_m), which gives each matrix a type of its own. q6_k, q4_0
    and others name both a mix and a type: the default is the mix, an override the type.
    """

    default: DefaultName
    overrides: Annotated[
        Mapping[Role, SchemeName], BeforeValidator(_overrides, json_schema_input_type=_OverridesFile)
    ] = Field(default_factory=dict)


class CalibrationSource(StrEnum):
    """What the model is shown so that the quantizer learns which errors matter."""

    NONE = "none"
    RANDOM_TOKENS = "random-tokens"
    TEXT = "text"
    DATASET = "dataset"
    SELF = "self"
    IMATRIX = "imatrix"

    @property
    def is_text(self) -> bool:
        """Whether the model reads sequences of text."""
        return self in (CalibrationSource.TEXT, CalibrationSource.DATASET, CalibrationSource.SELF)


class Calibration(_Part):
    """What the quantizer learns from.

    `random-tokens` needs no text: see converters.quantize.importance. `text` reads sequences of a file's or a folder's
    text, by default Python's own documentation; `dataset` a dataset's of the Hub; `self` what the model writes itself,
    token by token. `imatrix` takes what llama.cpp measured. A relative file is looked for from the working directory,
    like a model's folder.
    """

    source: CalibrationSource = CalibrationSource.NONE
    tokens: Count = Field(default=128, description="of random-tokens")
    text: Text | None = Field(
        default=None, description="a file or a folder of .txt, .md, .jsonl, .json or .parquet; default: built in"
    )
    dataset: Text | None = Field(default=None, description="a dataset's id on the Hub, for source dataset")
    revision: Text | None = Field(default=None, description="of the dataset; the manifest records the commit")
    files: Text | None = Field(default=None, description='of the dataset, such as "data/train-*.parquet"')
    chat: Flag = Field(default=False, description="text goes through the model's chat template, as a user's messages")
    sequences: Count = Field(default=64, description="of text")
    length: Annotated[int, Field(strict=True, ge=2)] = Field(default=512, description="tokens of each sequence of text")
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    file: Text | None = Field(
        default=None, description="llama.cpp's importance matrix of the model, for source imatrix; .gguf or .dat"
    )

    @property
    def is_on(self) -> bool:
        """Whether the quantizer gets an importance of each column."""
        return self.source is not CalibrationSource.NONE


class Method(StrEnum):
    """How the codes of an integer scheme are chosen. Other schemes round to nearest, with importances if calibrated."""

    RTN = "rtn"
    HQQ = "hqq"
    AWQ = "awq"
    GPTQ = "gptq"
    AWQ_GPTQ = "awq+gptq"
    GPTQ_ADAROUND = "gptq+adaround"
    GPTQ_SIGNROUND = "gptq+signround"
    BEST = "best"

    @property
    def scales(self) -> bool:
        """Whether columns are scaled before they are quantized: converters.quantize.awq."""
        return self in (Method.AWQ, Method.AWQ_GPTQ)

    @property
    def fits(self) -> bool:
        """Whether layers are fitted to what the float model computes: converters.quantize.gptq."""
        return self in (Method.GPTQ, Method.AWQ_GPTQ, Method.GPTQ_ADAROUND, Method.GPTQ_SIGNROUND)


def _budget_size(text: object) -> str:
    if not isinstance(text, str):
        raise ValueError(EXPECTED)
    parse_budget(text)
    return text


class Sensitivity(StrEnum):
    """How it is found what each matrix costs in fewer bits."""

    ESTIMATED = "estimated"
    MEASURED = "measured"


class Budget(_Part):
    """What the largest artifact may take. Matrices then get the schemes that cost the least (tundish.budget): those
    that the recipe gives them, or alternatives."""

    size: Annotated[str, PlainValidator(_budget_size), WithJsonSchema({"type": "string", "pattern": PATTERN})] = Field(
        description="bytes of the largest artifact, such as 1.9GB, 92MB or 88MiB, or 120% of those of all matrices "
        "in the recipe's own schemes; or bits a weight, such as 4.5bpw"
    )
    schemes: Annotated[tuple[SchemeName, ...], Field(min_length=1)] | None = Field(
        default=None, description="alternatives to the default scheme; absent: a list of those that all targets hold"
    )
    fixed: tuple[Role, ...] = Field(default=(), description="roles whose matrices keep the recipe's own scheme")
    sensitivity: Sensitivity = Field(
        default=Sensitivity.ESTIMATED,
        description="estimated: from gradients, in minutes; measured: a run of the model for each matrix",
    )

    @property
    def parsed(self) -> BudgetSize:
        """The size in numbers."""
        return parse_budget(self.size)


def _budget(data: object) -> object:
    if data is None or isinstance(data, Mapping | Budget):
        return data
    return {"size": _budget_size(data)}


class Evaluation(_Part):
    """Held-out text for KL and top-1: so many sequences of so many tokens."""

    sequences: Count = 4
    length: Count = 256
    teraflops: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="most arithmetic of a pass over the text, 2 operations a weight and token; larger models read less",
    )


class Question(_Part):
    """A chat prompt that is answered greedily; the answer has to end by a stop token within `max_tokens`."""

    prompt: Text = "What is the capital of France?"
    max_tokens: Count = 64


class Gates(_Part):
    """What an artifact must reach. Without a gate, `kl` and `top1` are measured; a `kl` that is not finite fails."""

    kl: Nats | None = Field(
        default=None, description="highest mean KL divergence from the float32 interpreter, in nats"
    )
    top1: Fraction | None = Field(
        default=None, description="lowest share of positions with the interpreter's first choice"
    )
    tokens: Fraction = Field(
        default=0.0, description="highest share of texts whose token ids differ from the reference tokenizer's"
    )
    codes_equal: Flag = Field(default=True, description="weights read back from the artifact equal what was quantized")
    chat: Flag = Field(default=True, description="the container's own renderer gives the chat template's prompts")
    stops: Flag = Field(default=True, description="the greedy answer ends by a stop token")
    state: Nats = Field(
        default=0.03,
        description="highest mean KL divergence from one pass of reading in pieces, in turns or in a batch, in nats",
    )
    as_opened_kl: Nats | None = Field(
        default=None,
        description="highest mean KL divergence as users open it, in nats; without one twice `kl` and 0.05",
    )
    longrope_boundary: Flag = Field(
        default=True, description="kl on both sides of LongRoPE's original context, if claimed"
    )


class EvaluationOverride(_Part):
    """What differs for one target; an absent key keeps the recipe's."""

    sequences: Count | None = None
    length: Count | None = None
    teraflops: Annotated[float, Field(gt=0)] | None = None


class GatesOverride(_Part):
    """What differs for one target; an absent key keeps the recipe's."""

    kl: Nats | None = None
    top1: Fraction | None = None
    tokens: Fraction | None = None
    codes_equal: Flag | None = None
    chat: Flag | None = None
    stops: Flag | None = None
    state: Nats | None = None
    as_opened_kl: Nats | None = None
    longrope_boundary: Flag | None = None


class VerifyOverride(_Part):
    """What differs in the verification of one target."""

    time_limit: Count | None = None
    text: EvaluationOverride = EvaluationOverride()
    gates: GatesOverride = GatesOverride()


_VerifyOverridesFile = _keyed("VerifyOverrides", {target.value: VerifyOverride for target in OPTIONS})


def _verify_overrides(data: object) -> dict[Target, VerifyOverride]:
    return _by_target(_VerifyOverridesFile.model_validate(data))


class TargetVerify(_Part):
    """Verification of one target, overrides applied."""

    time_limit: Count
    text: Evaluation
    answer: Question
    gates: Gates


class Verify(_Part):
    """How artifacts are compared with the reference before they are published."""

    enabled: Flag = True
    required: tuple[Target, ...] = Field(default=(), description="targets whose missing runtime is an error")
    time_limit: Count = Field(default=1800, description="seconds for one runtime; longer counts as a failed gate")
    text: Evaluation = Evaluation()
    answer: Question = Question()
    gates: Gates = Gates()
    overrides: Annotated[
        Mapping[Target, VerifyOverride],
        BeforeValidator(_verify_overrides, json_schema_input_type=_VerifyOverridesFile),
    ] = Field(default_factory=dict)

    def for_target(self, target: Target) -> TargetVerify:
        """The settings that hold for one target."""
        over = self.overrides.get(target, VerifyOverride())
        return TargetVerify(
            time_limit=over.time_limit or self.time_limit,
            text=self.text.model_copy(update=over.text.model_dump(exclude_none=True)),
            answer=self.answer,
            gates=self.gates.model_copy(update=over.gates.model_dump(exclude_none=True)),
        )


class Recipe(_Part):
    """What to make of a model for one class of devices, and what must hold before it is published."""

    name: Text = Field(description="the file's name without its suffix, which is also the default")
    description: Text
    device: Device
    model: ModelSource
    context: Count | Literal["full"] = Field(description="context length in tokens, at most the model's; or 'full'")
    schemes: Schemes
    method: Method = Field(
        default=Method.RTN,
        description="rtn: round to nearest; hqq: half-quadratic, without data; on calibration text, awq: scale columns "
        "by what drives them, gptq: fit each layer's output, awq+gptq: both, gptq+adaround and gptq+signround: then "
        "refine rounding by gradient; best: what was measured to be, gptq on text and rtn without",
    )
    calibration: Calibration = Calibration()
    budget: Annotated[Budget | None, BeforeValidator(_budget, json_schema_input_type=Budget | str | None)] = None
    targets: Annotated[
        Mapping[Target, SerializeAsAny[TargetOptions]],
        Field(min_length=1),
        BeforeValidator(_targets, json_schema_input_type=_TargetsFile),
    ]
    verify: Verify = Verify()

    @property
    def settled_method(self) -> Method:
        """The method itself where the recipe says `best`: what docs/quantization.md measured to be, with text and
        without."""
        if self.method is not Method.BEST:
            return self.method
        return Method.GPTQ if self.calibration.source.is_text else Method.RTN


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of that name, or in that file if the argument is a path or looks like one.

    Raises one UsageError with every mistake, each with `file:line`.
    """
    return _load(_find(name_or_path), {})


def _load(path: Path, files: Files) -> Recipe:
    problems: list[Problem] = []
    located = _with_name(resolve(path, LIBRARY, NOT_INHERITED, problems, files), path, problems)
    try:
        recipe = Recipe.model_validate(located.plain())
    except ValidationError as error:
        problems += problems_of(error, located, json_schema())
    else:
        problems += _contradictions(recipe, located)
    raise_all(problems)
    return recipe


def line_of(name_or_path: str | Path, key: Sequence[str | int]) -> Where:
    """Where that recipe states a key, or the innermost one on the way that it states. UsageError as load_recipe."""
    return locate(resolve(_find(name_or_path), LIBRARY, NOT_INHERITED, [], {}), key)[0].where


def recipe_name(name_or_path: str) -> str:
    """What load_recipe's recipe is called, also where it cannot be loaded."""
    return Path(name_or_path).stem if _is_path(name_or_path) else name_or_path


def list_recipes() -> list[Recipe]:
    """Every packaged recipe, by name."""
    files: Files = {}
    return [_load(LIBRARY / (name + SUFFIX), files) for name in recipe_names()]


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with everything inherited and every default written out; reads back as the same recipe."""
    yaml = YAML()
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(_plain(recipe), stream)
    return stream.getvalue()


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256, in hex, of the resolved recipe as JSON with sorted keys."""
    text = json.dumps(_plain(recipe), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def json_schema() -> dict[str, Json]:
    """JSON Schema of a recipe file for editors, kept in recipes/recipe.schema.json.

    With `extends` every key may be absent, and null removes what is inherited.
    """
    schema: dict[str, Json] = Recipe.model_json_schema()
    partial = _partial(schema)
    assert isinstance(partial, dict) and isinstance(partial["properties"], dict)
    assert isinstance(schema["required"], list)
    extends: dict[str, Json] = {"type": "string", "description": "another recipe, by name or relative path"}
    partial["properties"] = {"extends": extends, **partial["properties"]}
    required: list[Json] = [key for key in schema["required"] if key != "name"]
    partial["if"] = {"not": {"required": ["extends"]}}
    partial["then"] = {"required": required}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **partial}


def _partial(schema: Json) -> Json:
    """A schema in which no key is required and each may be null."""
    if isinstance(schema, list):
        return [_partial(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed: dict[str, Json] = {}
    for key, value in schema.items():
        if key == "properties" and isinstance(value, dict):
            changed[key] = {name: _or_null(_partial(inner)) for name, inner in value.items()}
        elif key == "$defs" and isinstance(value, dict):
            changed[key] = {name: _partial(inner) for name, inner in value.items()}
        elif key not in ("required", "default", "title"):
            changed[key] = _partial(value)
    return changed


def _or_null(schema: Json) -> Json:
    assert isinstance(schema, dict)
    null: dict[str, Json] = {"type": "null"}
    choices, kind, values = schema.get("anyOf"), schema.get("type"), schema.get("enum")
    if isinstance(choices, list):
        return schema if null in choices else {**schema, "anyOf": [*choices, null]}
    if not isinstance(kind, str):
        return {"anyOf": [schema, null]}
    nullable: dict[str, Json] = {**schema, "type": [kind, "null"]}
    return {**nullable, "enum": [*values, None]} if isinstance(values, list) else nullable


def _plain(recipe: Recipe) -> dict[str, Json]:
    plain: dict[str, Json] = recipe.model_dump(mode="json", exclude_none=True)
    return plain


def _is_path(name_or_path: str) -> bool:
    return name_or_path.endswith((SUFFIX, ".yml")) or "/" in name_or_path or "\\" in name_or_path


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or _is_path(text):
        try:
            path = Path(name_or_path).expanduser()
            is_file = path.is_file()
        except (OSError, RuntimeError) as error:  # a name too long, no permission; the home folder of nobody
            raise UsageError("no such recipe file", where=text, found=str(error)) from error
        if not is_file:
            raise UsageError("no such recipe file", where=text)
        return path
    names = recipe_names()
    if text in names:
        return LIBRARY / (text + SUFFIX)
    near = get_close_matches(text, names, 1)
    raise UsageError(
        f"unknown recipe {text!r}",
        where=f"did you mean {near[0]}?" if near else None,
        expected="one of " + ", ".join(names),
        mend=f"A recipe of your own is given by its path, such as ./{text}{SUFFIX}.",
    )


def _with_name(located: Located, path: Path, problems: list[Problem]) -> Located:
    """The recipe with its name filled in, which is the file's."""
    assert isinstance(located.value, Mapping)
    stated = located.value.get("name")
    if stated is not None and stated.value != path.stem:
        mend = "Leave the key out or rename the file."
        problems.append(Problem("name is not the file's", stated.where, path.stem, repr(stated.plain()), mend))
    return Located({**located.value, "name": Located(path.stem, located.where)}, located.where)


def _contradictions(recipe: Recipe, located: Located) -> list[Problem]:
    """Keys that are right each by itself, but not together."""
    problems = []
    for target in recipe.verify.required:
        if target not in recipe.targets:
            where = locate(located, ("verify", "required"))[0].where
            expected = "some of " + ", ".join(recipe.targets) + "; an inherited list is replaced by a new one"
            problems.append(Problem("required target that the recipe does not make", where, expected, target))
    if recipe.budget is not None and not _starts_budget(recipe.schemes.default):
        where = locate(located, ("schemes", "default"))[0].where
        expected = "a quantized scheme, such as int4_g32"
        problems.append(Problem("a budget needs a scheme to start from", where, expected, recipe.schemes.default.name))
    for target in recipe.targets:
        length = recipe.verify.for_target(target).text.length
        if recipe.context != "full" and length > recipe.context:
            own = ("verify", "overrides", target, "text", "length")
            overridden = locate(located, own)[1] == own
            where = locate(located, own if overridden else ("verify", "text", "length"))[0].where
            expected = f"at most the context, {recipe.context} tokens"
            problems.append(Problem("evaluation text longer than the context", where, expected, str(length)))
    return problems + _calibration_contradictions(recipe, located)


def _calibration_contradictions(recipe: Recipe, located: Located) -> list[Problem]:
    calibration, problems = recipe.calibration, []
    source = calibration.source
    if source is CalibrationSource.IMATRIX and calibration.file is None:
        where = locate(located, ("calibration", "source"))[0].where
        problems.append(Problem("calibration by an importance matrix needs its file", where, "calibration.file"))
    if source is CalibrationSource.DATASET and calibration.dataset is None:
        where = locate(located, ("calibration", "source"))[0].where
        problems.append(Problem("calibration by a dataset needs its id", where, "calibration.dataset"))
    readers = {
        "file": CalibrationSource.IMATRIX,
        "text": CalibrationSource.TEXT,
        **dict.fromkeys(("dataset", "revision", "files"), CalibrationSource.DATASET),
    }
    for key, reader in readers.items():
        if getattr(calibration, key) is not None and source is not reader:
            where = locate(located, ("calibration", key))[0].where
            problems.append(Problem(f"calibration.{key} is not used", where, f"source {reader}", source))
    method = recipe.settled_method
    if (method.fits or method.scales) and not source.is_text:
        where = locate(located, ("method",))[0].where
        problems.append(
            Problem(f"{recipe.method} needs text to learn from", where, "calibration: {source: text}", source)
        )
    return problems


def _starts_budget(default: Scheme | Mix) -> bool:
    return isinstance(default, Scheme) and default.is_quantized


def schema_text() -> str:
    """The contents of recipes/recipe.schema.json."""
    return json.dumps(json_schema(), indent=1) + "\n"
