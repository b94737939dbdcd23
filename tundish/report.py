"""report.md: the manifest for people."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tundish.escapes import markdown
from tundish.front import front_rows, front_sentence

GATE_COLUMNS = ["gate", "result", "figure", "threshold", "detail"]
DIFFERENCE_COLUMNS = ["difference", "of", "what happens", "texts of the gate"]
_MARKS = {True: "passed", False: "FAILED", None: "not verified"}


def write_report(manifest: dict[str, Any]) -> str:
    """Markdown: what was made from what, the figures of every gate, and where bytes went."""
    source, recipe = manifest["source"], manifest["recipe"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    parts = [
        f"# {markdown(recipe['name'])}: {markdown(source['name'])}",
        markdown(recipe["description"]),
        markdown(
            f"Source: {source['repo_id'] or source['name']}{revision}, licence {source['licence'] or 'not stated'}. "
            f"Context: {manifest['context_length']} tokens. tundish {manifest['tundish']}."
        ),
        "## Artifacts",
        _artifacts(manifest),
        "## Gates",
        _gates(manifest),
        *_differences(manifest),
        "## Weights",
        table(*weight_rows(manifest)),
    ]
    if manifest.get("remarks"):
        parts += ["## Notes on the model", table(["note"], [[remark] for remark in manifest["remarks"]])]
    if manifest.get("budget") is not None:
        rows = front_rows(manifest["budget"])
        parts += ["## Budget", markdown(front_sentence(manifest["budget"])), table(rows[0], rows[1:])]
    return "\n\n".join(parts) + "\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of plain texts."""
    cells = [[markdown(cell) for cell in line] for line in [header, *rows]]
    lines = [cells[0], ["---"] * len(header), *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _artifacts(manifest: dict[str, Any]) -> str:
    verification = manifest["verification"] or {}
    rows = []
    for target, entry in manifest["targets"].items():
        result = verification.get(target, {"passed": None, "divergence": None, "answer": None})
        figures = result["divergence"]
        shown = ["–"] * 4
        if figures:
            perplexities = (cell(figures[key], ".3f") for key in ("perplexity", "reference_perplexity"))
            shown = [
                cell(figures["kl_mean"], ".6f"),
                cell(figures["kl_p99"], ".4f"),
                f"{100 * figures['top1']:.1f} %",
                "{} ({})".format(*perplexities),
            ]
        rows.append(
            [
                target,
                f"{entry['bytes'] / 1e6:.1f} MB",
                _MARKS[result["passed"]],
                *shown,
                entry["semantics"]["sentence"],
            ]
        )
    header = ["target", "size", "verification", "KL mean", "KL 99 %", "top-1 same", "perplexity (reference)", "context"]
    return table(header, rows)


def _gates(manifest: dict[str, Any]) -> str:
    if manifest["verification"] is None:
        return "**Not verified**: the build ran without verification. `tundish verify` does it later."
    rows = [[target, *row] for target, result in manifest["verification"].items() for row in gate_rows(result)]
    versions = [
        f"- {target}: " + markdown(", ".join(f"{name} {number}" for name, number in result["versions"].items()))
        for target, result in manifest["verification"].items()
        if result["versions"]
    ]
    return table(["target", *GATE_COLUMNS], rows) + ("\n\nRuntimes:\n\n" + "\n".join(versions) if versions else "")


def _differences(manifest: dict[str, Any]) -> list[str]:
    rows = [[target, *row] for target in manifest["targets"] for row in difference_rows(manifest, target)]
    return ["## Declared differences", table(["target", *DIFFERENCE_COLUMNS], rows)] if rows else []


def difference_rows(manifest: dict[str, Any], target: str) -> list[list[str]]:
    """Of a target's declared differences: the cells of DIFFERENCE_COLUMNS."""
    gates = (manifest["verification"] or {}).get(target, {"gates": []})["gates"]
    counts = {name: count for gate in gates for name, count in gate.get("declared", {}).items()}
    return [
        [each["name"], each["of"], each["sentence"], str(counts.get(each["name"], 0)) if gates else "not verified"]
        for each in manifest["targets"][target].get("differences", [])
    ]


def gate_rows(result: dict[str, Any]) -> list[list[str]]:
    """Of a target's result: the cells of GATE_COLUMNS."""
    return [
        [
            gate["name"],
            _MARKS[gate["passed"]],
            "" if gate["figure"] is None else f"{gate['figure']:.6g}",
            "" if gate["threshold"] is None else f"{gate['threshold']:g}",
            gate["detail"],
        ]
        for gate in result["gates"]
    ]


def cell(value: float | None, form: str) -> str:
    """A figure in a table, which may be none."""
    return "–" if value is None else format(value, form)


def weight_rows(manifest: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table's header and rows: how many tensors and parameters each scheme holds."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for entry in manifest["weights"].values():
        elements = 1
        for size in entry["shape"]:
            elements *= size
        counts[entry["scheme"]][0] += 1
        counts[entry["scheme"]][1] += elements
    rows = [[scheme, str(tensors), f"{elements:,}"] for scheme, (tensors, elements) in sorted(counts.items())]
    return ["scheme", "tensors", "parameters"], rows
