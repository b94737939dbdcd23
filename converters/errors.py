"""Errors a user can mend. Each says what went wrong, where, what was expected and found, and how to mend it."""

from __future__ import annotations

from converters.mask import masked


class TundishError(Exception):
    """Base of every error that reaches a user as one readable paragraph.

    `exit_status` is part of the command-line contract: 2 usage or recipe, 3 model, 4 gate, 5 disk or memory, 6 out of
    reach.
    """

    exit_status = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        mend: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.found, self.mend = what, where, expected, found, mend
        parts = [f"{what} ({where})" if where else what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if found is not None:
            parts.append(f"found {found}")
        sentence = "; ".join(parts).rstrip(".") + "."
        super().__init__(masked(_in_a_line(f"{sentence} {mend}" if mend else sentence)))


def _in_a_line(text: str) -> str:
    """As one paragraph for a terminal: some of it may be a stranger's, with line ends and escape sequences."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))


class UsageError(TundishError):
    """The command line or the recipe is wrong."""

    exit_status = 2


class ModelError(TundishError):
    """The checkpoint is damaged, incomplete or of a kind that tundish does not convert."""

    exit_status = 3


class NotFiniteError(ModelError):
    """The model computes NaN or Inf on sound input; a weight may be to blame, see quantize.block.blaming_weights."""


class GateError(TundishError):
    """An artifact was made and did not pass verification."""

    exit_status = 4


class ResourceError(TundishError):
    """Not enough disk or memory, or the output cannot be written."""

    exit_status = 5


class UnreachableError(TundishError):
    """A server could not be reached, or does not answer as one should."""

    exit_status = 6
