"""The front of a budget as people read it: in the plan and in the report."""

from __future__ import annotations

from typing import Any


def front_sentence(budget: dict[str, Any]) -> str:
    """What the table says."""
    return (
        f"The best assignments from the smallest to the largest; the budget of {budget['budget']} took the marked one. "
        "KL is foreseen: the sum of what matrices cost one by one, rounded to nearest, on calibration tokens. Schemes "
        "are counted in stacks of matrices that share one."
    )


def front_rows(budget: dict[str, Any]) -> list[list[str]]:
    """A table, the header first: sizes by target, bits a weight, KL in nats, schemes."""
    chosen = budget["chosen"]
    rows = [["", *(f"{target} MB" for target in chosen["nbytes"]), "bits a weight", "KL foreseen", "schemes"]]
    points = [("", point) for point in budget["front"]] + [("chosen", chosen)]
    for mark, point in sorted(points, key=lambda marked: max(marked[1]["nbytes"].values())):
        sizes = [f"{nbytes / 1e6:.1f}" for nbytes in point["nbytes"].values()]
        schemes = ", ".join(f"{count} {scheme}" for scheme, count in point["counts"].items())
        rows.append([mark, *sizes, f"{point['bits_per_weight']:.2f}", f"{point['kl']:.4g}", schemes])
    return rows
