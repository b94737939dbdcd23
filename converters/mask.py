"""Addresses without the credentials in them."""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/\s?#]*@")


def masked(text: str) -> str:
    """The text, in which the user and password of every address are one sign."""
    return _CREDENTIALS.sub("…@", text)
