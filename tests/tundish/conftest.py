"""One tiny checkpoint and one unverified build of it for all tests here, which must not change them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every test begins with an empty cache; slow ones share the user's for the sample in it."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("TUNDISH_CACHE", str(tmp_path_factory.mktemp("cache") / "tundish"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tundish.tiny import write_tiny_phi3  # imports torch, which few tests here need

    return write_tiny_phi3(tmp_path_factory.mktemp("models") / "tiny phi3 ünïcode")


@pytest.fixture(scope="session")
def poured(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four containers, int4, not verified."""
    from tests.tundish.tiny import INT4, QUIET, write_recipe
    from tundish.job import Choices, build

    folder = tmp_path_factory.mktemp("poured")
    recipe = write_recipe(folder / "int4.yaml", checkpoint, schemes=INT4)
    build(Choices(str(recipe), out=folder / "out", verify=False), QUIET)
    return folder / "out"


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a folder is replaced: as here, and as where names cannot be exchanged."""
    if request.param == "two renames":
        monkeypatch.setattr("tundish.publish.exchange", lambda one, other: False)
    elif sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    way: str = request.param
    return way
