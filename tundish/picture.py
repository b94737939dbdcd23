"""The picture of a comparison: size against KL, as SVG. Same figures, same bytes, for one version of matplotlib."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from converters.errors import UsageError

LOWEST = 1e-8  # nats: below it, what float32 logits are rounded to is all that differs; also, a logarithm needs it
_ROW = 0.07  # of the axes' height: the least distance of two labels
_MARKERS = "osD^vPX<>p*h"


@dataclass(frozen=True, slots=True)
class Mark:
    """One artifact: bytes of its weights, mean KL in nats. Marks of a `kind` look alike."""

    label: str
    kind: str
    nbytes: int
    kl: float


def require_matplotlib() -> None:
    """UsageError naming the pip extra if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "drawing the picture needs matplotlib",
            mend="pip install 'tundish[plot]', or leave --out away: the table needs nothing.",
        )


def size_against_kl(marks: Sequence[Mark]) -> str:
    """An SVG with MB on x, and KL on a logarithmic y. Labels stand in a column at the right, in order of KL."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update({"svg.hashsalt": "tundish", "svg.fonttype": "none"})
        figure = Figure(figsize=(9, 4.8))
        axes = figure.add_axes((0.1, 0.12, 0.5, 0.82))
        axes.set_yscale("log")
        axes.set_xlabel("weights, MB")
        axes.set_ylabel("mean KL from the float32 model, nats")
        axes.grid(True, which="both", alpha=0.25)
        axes.margins(0.1)
        kinds = list(dict.fromkeys(mark.kind for mark in marks))
        for mark in marks:  # hollow, since containers of one build lie upon one another
            kind = kinds.index(mark.kind)
            axes.plot(
                mark.nbytes / 1e6,
                _drawn(mark),
                _MARKERS[kind % len(_MARKERS)],
                color=f"C{kind}",
                markersize=8,
                fillstyle="none",
            )
        low, high = (math.log10(edge) for edge in axes.get_ylim())
        ordered = sorted(marks, key=lambda mark: (_drawn(mark), mark.nbytes, mark.label))
        heights = _spread([(math.log10(_drawn(mark)) - low) / (high - low) for mark in ordered])
        for mark, height in zip(ordered, heights, strict=True):
            axes.annotate(
                f"{mark.label}  {mark.nbytes / 1e6:.1f} MB  {mark.kl:.4g}",
                (mark.nbytes / 1e6, _drawn(mark)),
                xytext=(1.05, height),
                textcoords="axes fraction",
                va="center",
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "relpos": (0, 0.5)},
            )
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _drawn(mark: Mark) -> float:
    return max(mark.kl, LOWEST)


def _spread(wanted: Sequence[float]) -> list[float]:
    """Heights in ascending order, each at least a row above the one before, as low as that allows but within 0 to 1
    where all fit."""
    row = min(_ROW, 1 / max(len(wanted) - 1, 1))
    placed: list[float] = []
    for index, height in enumerate(wanted):
        highest = 1 - row * (len(wanted) - 1 - index)
        lowest = placed[-1] + row if placed else 0.0
        placed.append(max(lowest, min(height, highest)))
    return placed
