"""What commands print: their documents, which --json prints as they are, as text and aligned tables."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tundish.escapes import in_a_line

if TYPE_CHECKING:
    from tundish.cache import Entry


def columns(rows: list[list[str]], right: frozenset[int] = frozenset()) -> str:
    """Rows of cells as aligned text; the first row is the header."""
    rows = [[in_a_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def summary_text(manifest: dict[str, Any]) -> str:
    """A manifest: a row a gate of every target."""
    from tundish.report import GATE_COLUMNS, gate_rows

    rows = [["target", "bytes", *GATE_COLUMNS]]
    for target, entry in manifest["targets"].items():
        verification = (manifest["verification"] or {}).get(target)
        if verification is None:
            rows.append([target, f"{entry['bytes']:,}", "–", "not verified", "", "", ""])
            continue
        for index, row in enumerate(gate_rows(verification)):
            head = [target, f"{entry['bytes']:,}"] if index == 0 else ["", ""]
            rows.append([*head, *row])
    return columns(rows, frozenset({1, 4, 5}))


def comparison_text(document: dict[str, Any]) -> str:
    """What tundish.comparison measured: a row an artifact."""
    from tundish.comparison import remarks, table_rows

    rows = table_rows(document)
    return "\n".join([columns(rows, frozenset(range(1, len(rows[0])))), "", *remarks(document)])


def plan_text(document: dict[str, Any]) -> str:
    """A plan: a row a tensor, the files, and what the build needs."""
    targets = list(document["targets"])
    rows = [["tensor", "shape", "scheme", *(f"{target} bytes" for target in targets)]]
    for row in document["tensors"]:
        asked = (
            ""
            if row["requested"] == row["scheme"]
            else f" (asked for {row['requested']}, whose groups or blocks do not divide {row['shape'][-1]})"
        )
        sizes = [f"{row['bytes'][target]:,}" for target in targets]
        rows.append([row["name"], "×".join(map(str, row["shape"])), row["scheme"] + asked, *sizes])
    parts = [columns(rows, frozenset(range(3, 3 + len(targets))))]
    for target, entry in document["targets"].items():
        files = "\n".join(f"  {size:>15,}  {name}" for name, size in entry["files"].items())
        declared = "".join(f"\n  differs: {each['sentence']}" for each in entry["differences"])
        parts.append(f"{target}: {entry['bytes']:,} bytes. {entry['semantics']}{declared}\n{files}")
    if document["remarks"]:
        parts.append("\n".join(f"note: {remark}" for remark in document["remarks"]))
    if document["budget"] is not None:
        parts.append(_budget_text(document["budget"]))
    peaks = ", ".join(f"{phase} {nbytes:,}" for phase, nbytes in document["peak_memory"].items())
    kept = f", of which {document['cache']:,} in the cache for the calibration" if document["cache"] else ""
    cached = ["calibration: cached"] if document["calibration"] else []
    needs = [
        *cached,
        f"disk: {document['disk']:,} bytes{kept}",
        f"peak memory, about: {peaks} bytes, the verifying runtimes aside",
    ]
    if document["time"] is not None:
        named = ", ".join(f"{part} {_seconds(spent)}" for part, spent in document["time"].items() if part != "total")
        total = _seconds(document["time"]["total"])
        needs.append(f"time, about: {total}, of which some runs at the same time ({named}); verification comes on top")
    return "\n\n".join([*parts, "\n".join(needs)])


def _budget_text(budget: dict[str, Any]) -> str:
    from tundish.front import front_rows, front_sentence

    rows = front_rows(budget)
    return f"{front_sentence(budget)}\n{columns(rows, frozenset(range(1, len(rows[0]) - 1)))}"


def _seconds(spent: float) -> str:
    return f"{spent:.0f} s" if spent >= 10 else f"{spent:.1f} s"


def cache_rows(entries: list[Entry]) -> list[dict[str, Any]]:
    """The document of entries of the cache."""
    return [
        {
            "key": entry.key,
            "kind": entry.kind,
            "model": entry.model,
            "method": entry.method,
            "text": entry.text,
            "bytes": entry.nbytes,
            "last_used": datetime.fromtimestamp(entry.last_used, UTC).isoformat(timespec="seconds"),
            "folder": str(entry.folder),
        }
        for entry in entries
    ]


def cache_text(document: list[dict[str, Any]]) -> str:
    """The rows of cache_rows."""
    names = ["key", "kind", "model", "method", "text", "bytes", "last used"]
    rows = [
        [*(row[name] for name in names[:5]), f"{row['bytes']:,}", row["last_used"].replace("T", " ")[:16]]
        for row in document
    ]
    total = sum(row["bytes"] for row in document)
    return columns([names, *rows], frozenset({5})) + f"\n{len(rows)} entries, {total:,} bytes"


def collected_text(document: dict[str, Any]) -> str:
    """What `tundish cache gc` removed and left."""
    lines = [f"removed: {row['folder']}, {row['bytes']:,} bytes" for row in document["removed"]]
    lines += [f"left alone: {row['folder']}, in use" for row in document["in_use"]]
    return "\n".join([*lines, f"{len(document['removed'])} entries removed, {document['bytes']:,} bytes"])


def imatrix_text(document: dict[str, Any]) -> str:
    """What `tundish imatrix` wrote."""
    return (
        f"{document['file']}: {document['entries']} entries from {document['chunks']} chunks of "
        f"{document['chunk_size']} tokens, {document['bytes']:,} bytes"
    )


def matrix_text(document: dict[str, Any]) -> str:
    """What became of a matrix's cells, a row each."""
    rows = [["model", "recipe", "result", "status", "seconds", "bytes", "why"]]
    for cell in document["cells"]:
        nbytes = f"{sum(cell['bytes'].values()):,}" if cell["bytes"] else ""
        result = "FAILED" if cell["result"] == "failed" else cell["result"]
        numbers = [str(cell["status"]), f"{cell['seconds']:.0f}" if cell["seconds"] else "", nbytes]
        rows.append([cell["model"], cell["recipe"], result, *numbers, cell["message"]])
    counts = Counter(cell["result"] for cell in document["cells"])
    told = ", ".join(f"{counts[result]} {result}" for result in ("built", "reused", "failed") if counts[result])
    return columns(rows, frozenset({3, 4, 5})) + f"\n{told}; in {document['out']}"


def tensor_text(document: list[dict[str, Any]]) -> str:
    """What `tundish inspect` found, a row a tensor."""
    rows = [["file", "tensor", "type", "shape", "bytes"]]
    for row in document:
        size = f"those of {row['shares']}" if row["shares"] else f"{row['bytes']:,}"
        rows.append([row["file"], row["name"], row["type"], "×".join(map(str, row["shape"])), size])
    total = sum(row["bytes"] for row in document if not row["shares"])
    return columns(rows, frozenset({4})) + f"\n{len(document)} tensors, {total:,} bytes"


def recipes_text(document: list[dict[str, Any]]) -> str:
    """Recipes, a row each."""
    rows = [["recipe", "device", "containers", "scheme", "context", "what"]]
    for row in document:
        first = row["description"].split(". ")[0].replace("\n", " ")
        rows.append([row["name"], row["device"], ",".join(row["targets"]), row["scheme"], str(row["context"]), first])
    return columns(rows, frozenset({4}))


def doctor_text(document: list[dict[str, Any]]) -> str:
    """What `tundish doctor` found, a row a container."""
    rows = [["container", "export", "verify", "versions", "devices"]]
    for row in document:
        versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
        export = "yes" if row["exports"] else "no: " + row["mend"]
        verifies = "yes" if row["verifies"] else "no: " + row["mend"]
        rows.append([row["target"], export, verifies, versions, ", ".join(row["devices"])])
    return columns(rows)
