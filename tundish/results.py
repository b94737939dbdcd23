"""What verification comes to: gates, each a comparison, and the result of all of an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from exporters.base import Target
from tundish.divergence import Divergence

AGREEMENT = "top1"  # the one gate whose figure must be large
NOT_FINITE = "; its logits give no finite figure"


@dataclass(frozen=True, slots=True)
class Gate:
    """One comparison. `passed` is None where it could not be made; `detail` says why, or what differed."""

    name: str
    passed: bool | None
    figure: float | None = None
    threshold: float | None = None
    detail: str = ""
    declared: Mapping[str, int] = field(default_factory=dict)  # texts that differ as declared, by kind


@dataclass(frozen=True, slots=True)
class TargetResult:
    """All gates of one artifact, with the versions of the runtime that was asked."""

    target: Target
    gates: tuple[Gate, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    divergence: Divergence | None = None
    answer: str | None = None

    @property
    def passed(self) -> bool | None:
        """The verdict."""
        return verdict(gate.passed for gate in self.gates)


def verdict(gates: Iterable[bool | None]) -> bool | None:
    """What gates come to: False if one failed, None if nothing could be verified, else True."""
    passed = {*gates}
    return False if False in passed else True if True in passed else None


def measured(name: str, figure: float | None, threshold: float | None, detail: str) -> Gate:
    """A gate whose figure was measured. Where the recipe sets no threshold, it is not judged.

    A figure of None, which is no finite number, fails in any case: no artifact is meant to have such logits.
    """
    if figure is None:
        return Gate(name, False, None, threshold, detail + NOT_FINITE)
    return Gate(name, None if threshold is None else meets(name, figure, threshold), figure, threshold, detail)


def meets(name: str, figure: float, threshold: float) -> bool:
    """Whether a figure is what its gate asks for; NaN never is."""
    return figure >= threshold if name == AGREEMENT else figure <= threshold
