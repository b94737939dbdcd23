"""What matrices cost in fewer bits takes minutes to find, and is kept in the cache: for the build after a plan, and for
other budgets of the same model. An entry is an index alone, whose own digest tells when it is damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from converters.errors import ResourceError
from tundish.allocate import F64
from tundish.cache import Json, cache_disk, cache_folder, canonical, costs, found, put, reclaim_entries, write_index
from tundish.disk import cache_errors
from tundish.publish import staging

COSTS_VERSION = 2  # to be raised whenever the same key comes to other costs


@dataclass(slots=True)
class CostMemory:
    """The costs of one checkpoint's stacks, kept from an earlier time or to be kept.

    `checkpoint` gives the SHA-256 of each of source_files by name; `fresh`: found anew, even if they are known.
    `seconds` is what finding them took.
    """

    checkpoint: Callable[[], Mapping[str, str]]
    fresh: bool
    say: Callable[[str], None]
    seconds: float = 0.0

    def recall(
        self,
        model: str,
        text: str,
        read: Mapping[str, Any],
        settings: Mapping[str, Any],
        find: Callable[[], list[F64]],
    ) -> list[F64]:
        """Costs f64[options] of each stack: those of an earlier time with the same `read` and `settings`, or what
        find() comes to. `model` and `text` are what people call these."""
        versions = {"version": COSTS_VERSION, "tundish": version("tundish"), "numpy": np.__version__}
        key: Json = {**versions, **read, **settings, "checkpoint": dict(self.checkpoint())}
        folder = costs() / canonical(key)
        if not self.fresh:
            with found(folder, key, lambda index: [], self.say, "what matrices cost is found anew") as index:
                if index is not None:
                    self.say(f"what matrices cost: cached ({folder.name[:12]} of `tundish cache ls`)")
                    return [np.array(each, np.float64) for each in index["costs"]]
        begun = perf_counter()
        made = find()
        self.seconds += perf_counter() - begun
        content = {"key": key, "model": model, "text": text, "costs": [each.tolist() for each in made]}
        try:
            self._keep(folder, content)
        except ResourceError as error:  # no reason to give up what has been found
            self.say(f"warning: what matrices cost is not kept: {error}")
        return made

    def _keep(self, folder: Path, content: Json) -> None:
        if cache_disk() is None:
            self.say(f"warning: {cache_folder()} cannot be written to, so that what matrices cost is not kept")
            return
        reclaim_entries(self.say)
        with staging(folder, cache_errors) as stage, cache_errors(folder):
            entry = stage / "entry"
            entry.mkdir()
            write_index(entry, content)
            put(entry, folder, self.fresh)
