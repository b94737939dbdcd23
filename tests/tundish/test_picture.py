"""The picture of a comparison: marks and labels where figures say, no labels over one another, the same bytes again."""

from __future__ import annotations

import importlib.util
import itertools
import re
from xml.etree import ElementTree

import pytest

from converters.errors import UsageError
from tundish.picture import Mark, _spread, require_matplotlib, size_against_kl

SVG = "{http://www.w3.org/2000/svg}"
MARKS = [
    Mark("a/gguf", "gguf", 90_100_000, 0.17),
    Mark("a/mlx", "mlx", 90_200_000, 0.1701),
    Mark("b/gguf", "gguf", 107_000_000, 0.034),
    Mark("c/gguf", "gguf", 538_000_000, -1e-12),
]


def test_every_artifact_is_named_and_marked() -> None:
    pytest.importorskip("matplotlib")
    drawing = size_against_kl(MARKS)
    texts = ["".join(text.itertext()).strip() for text in ElementTree.fromstring(drawing).iter(f"{SVG}text")]
    labels = [text for text in texts if "/" in text]
    assert labels == [
        "c/gguf  538.0 MB  -1e-12",
        "b/gguf  107.0 MB  0.034",
        "a/gguf  90.1 MB  0.17",
        "a/mlx  90.2 MB  0.1701",
    ]
    assert "weights, MB" in texts and "mean KL from the float32 model, nats" in texts


def test_the_same_bytes_whatever_the_settings() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    first = size_against_kl(MARKS)
    with matplotlib.rc_context({"axes.grid": True, "font.size": 30, "svg.fonttype": "path"}):
        assert size_against_kl(MARKS) == first
        assert matplotlib.rcParams["font.size"] == 30, "the caller's settings stay"
    assert not re.search(r"<dc:date>|20\d\d-\d\d-\d\d", first)


def test_labels_keep_their_distance() -> None:
    assert _spread([0.2, 0.9]) == [0.2, 0.9]
    for wanted in ([0.5] * 5, [1.0] * 15, [0.0, 0.0, 1.0], [0.3] * 40):
        placed = _spread(wanted)
        row = min(0.07, 1 / (len(wanted) - 1))
        assert placed[0] >= 0 and placed[-1] <= 1 + 1e-9
        assert all(after - before >= row - 1e-9 for before, after in itertools.pairwise(placed))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs matplotlib.*tundish\[plot\]"):
        require_matplotlib()
