"""~name in paths that users give: a home folder that is nobody's is told, and no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from converters.errors import UsageError
from tundish.cache import cache_folder
from tundish.calibrate import origin_of
from tundish.comparison import Comparison, _texts, find_artifacts
from tundish.importance_matrix import make_imatrix
from tundish.job import Choices
from tundish.recipe import Calibration, CalibrationSource
from tundish.sample import write_sample
from tundish.user_path import expanded
from tundish.watcher import SILENT

NOBODY = Path("~no-such-user/x")
TEXT = Calibration(source=CalibrationSource.TEXT, text=str(NOBODY))
CHOICES = Choices("phi35-best-int4", "sample")
USES: dict[str, Callable[[], object]] = {
    "sample": lambda: write_sample(NOBODY),
    "artifacts": lambda: find_artifacts([NOBODY]),
    "text of a comparison": lambda: next(_texts(Comparison([], text=NOBODY))),
    "cache": cache_folder,
    "text of a calibration": lambda: origin_of(TEXT),
    "importance matrix": lambda: make_imatrix(CHOICES, NOBODY, None, SILENT),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_the_home_folder_of_nobody(use: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNDISH_CACHE", str(NOBODY))
    with pytest.raises(UsageError, match=r"no such home folder \(~no-such-user/x\)"):
        use()


def test_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert expanded("~/x") == tmp_path / "x"
    assert expanded(Path("a/~x")) == Path("a/~x")
