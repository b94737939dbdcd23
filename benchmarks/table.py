"""Plain tables on stdout, and the figures behind them as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

NONE = "–"


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title and aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, "", line(header), rule, *map(line, rows)]) + "\n"


def seconds(value: float | None) -> str:
    """12.3, or a dash for what was not measured."""
    return NONE if value is None else f"{value:.1f}"


def gigabytes(value: float | None) -> str:
    """Of memory or files, in 10^9 bytes."""
    return NONE if value is None else f"{value / 1e9:.2f}"


def milliseconds(value: float | None) -> str:
    """Of a decode step."""
    return NONE if value is None else f"{value * 1e3:.2f}"


def times(value: float | None) -> str:
    """A ratio, 4.6x."""
    return NONE if value is None else f"{value:.2f}x"


def machine() -> str:
    """What the figures were taken on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{os.cpu_count()} cores of {_processor()}, {memory:.0f} GB, {platform.system()} {platform.machine()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "an unnamed processor"


def write_json(path: Path | None, document: object) -> None:
    """Write the figures where a path was given."""
    if path is not None:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
