"""The README.md of an artifact folder: a model card as the Hub and those who download from it read them."""

from __future__ import annotations

import io
from typing import Any
from urllib.parse import quote

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from exporters.base import Card
from tundish.escapes import markdown
from tundish.report import DIFFERENCE_COLUMNS, cell, difference_rows, table, weight_rows

_PERPLEXITIES = ("perplexity", "reference_perplexity")


def model_card(manifest: dict[str, Any], target: str, card: Card) -> str:
    """Of one container of a build. All of it is from the manifest, which has the figures with all their digits."""
    source, entry = manifest["source"], manifest["targets"][target]
    name, repo_id = markdown(source["name"]), source["repo_id"]
    base = f"[{markdown(repo_id)}](https://huggingface.co/{quote(repo_id)})" if repo_id else name
    revision = f", revision {markdown(source['revision'])}" if source["revision"] else ""
    made = (
        f"{_quantization(manifest)}, by tundish {manifest['tundish']}. {_size(entry)} {entry['semantics']['sentence']}"
    )
    parts = [
        f"---\n{_front_matter(manifest, target, card)}---",
        f"# {name} for {card.runtime}",
        f"{base}{revision}, {markdown(made)}",
        "## Use",
        card.usage,
        "## Weights",
        table(*weight_rows(manifest)),
        *_differences(manifest, target),
        "## Measured",
        _figures((manifest["verification"] or {}).get(target)),
    ]
    return "\n\n".join(parts) + "\n"


def _differences(manifest: dict[str, Any], target: str) -> list[str]:
    rows = difference_rows(manifest, target)
    told = "Texts of these kinds come out otherwise than by the model's own tokenizer or chat template."
    return ["## Declared differences", told, table(DIFFERENCE_COLUMNS, rows)] if rows else []


def _front_matter(manifest: dict[str, Any], target: str, card: Card) -> str:
    """YAML in the Hub's terms; what the source does not state is left out."""
    source = manifest["source"]
    front = {
        "base_model": source["repo_id"],
        "base_model_relation": "quantized" if source["repo_id"] else None,
        "language": source["languages"],
        "library_name": card.library,
        "license": source["licence"],
        "license_name": source["licence_name"],
        "license_link": source["licence_link"],
        "pipeline_tag": "text-generation",
        "tags": [*card.tags, *(["quantized"] if _integers(manifest) else []), *_integers(manifest)],
    }
    yaml, stream = YAML(), io.StringIO()
    yaml.indent(sequence=4, offset=2)
    yaml.allow_unicode, yaml.width = True, 1000
    yaml.dump({key: _spelled(value) for key, value in front.items() if value}, stream)
    return stream.getvalue()


def _spelled(value: Any) -> Any:
    """Quoted where YAML 1.1, as the Hub's library reads it, takes a text for something else: Norwegian is `no`."""
    if isinstance(value, list):
        return [_spelled(each) for each in value]
    reader = YAML(typ="safe", pure=True)
    reader.version = (1, 1)
    try:
        return value if reader.load(value) == value else DoubleQuotedScalarString(value)
    except (YAMLError, ValueError, LookupError, RecursionError, AssertionError):  # as of a card, in source_card
        return DoubleQuotedScalarString(value)


def _integers(manifest: dict[str, Any]) -> list[str]:
    """Schemes of matrices that are no floats, the most frequent first."""
    schemes = [entry["scheme"] for entry in manifest["weights"].values() if len(entry["shape"]) > 1]
    found = {scheme: schemes.count(scheme) for scheme in schemes if scheme not in ("fp32", "fp16", "bf16")}
    return sorted(found, key=lambda scheme: (-found[scheme], scheme))


def _quantization(manifest: dict[str, Any]) -> str:
    schemes = _integers(manifest)
    if not schemes:
        return "converted, not quantized"
    calibration = manifest["calibration"]
    how = "" if calibration is None else f", calibrated ({_calibration(calibration)})"
    return f"quantized to {', '.join(schemes)}{how}"


def _calibration(record: dict[str, Any]) -> str:
    return ", ".join(str(record[key]) for key in ("source", "method", "text") if key in record)


def _size(entry: dict[str, Any]) -> str:
    return f"{entry['bytes'] / 1e6:,.1f} MB."


def _figures(verification: dict[str, Any] | None) -> str:
    if verification is None:
        return "**Not verified**: this artifact was built without verification, and nothing of it was measured."
    gates = [
        [
            gate["name"],
            {True: "passed", False: "FAILED", None: "not judged"}[gate["passed"]],
            "" if gate["figure"] is None else f"{gate['figure']:.3g}",
            "" if gate["threshold"] is None else f"{gate['threshold']:g}",
            gate["detail"],
        ]
        for gate in verification["gates"]
    ]
    parts = [table(["gate", "result", "figure", "threshold", "detail"], gates)]
    if verification["divergence"] is not None:
        parts.insert(0, _divergence(verification["divergence"], verification["versions"]))
    if verification["passed"] is None:
        parts.insert(0, "**Not verified**: its runtime was not there.")
    return "\n\n".join(parts)


def _divergence(figures: dict[str, Any], versions: dict[str, str]) -> str:
    runtime = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"Opened in its runtime ({markdown(runtime)}) and compared with the float32 model on held-out text, "
        f"{figures['positions']} positions:\n\n"
    ) + table(
        ["KL mean (nats)", "KL 99 %", "same first choice", "perplexity", "of the float32 model"],
        [
            [
                cell(figures["kl_mean"], ".3g"),
                cell(figures["kl_p99"], ".3g"),
                f"{100 * figures['top1']:.1f} %",
                *(cell(figures[key], ".2f") for key in _PERPLEXITIES),
            ]
        ],
    )
