"""One Hugging Face language model, quantized once, poured into several containers, and verified in each runtime.

The names in `__all__` are the public API; everything else may change. They are looked up when first used, so that
`import tundish` costs nothing and needs no runtime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converters.errors import GateError, ModelError, ResourceError, TundishError, UsageError
    from converters.interpret import interpret
    from converters.load import load_graph
    from tundish.job import Choices, build, plan_job
    from tundish.recheck import verify_again
    from tundish.recipe import list_recipes, load_recipe
    from tundish.watcher import Watcher

__all__ = [
    "Choices",
    "GateError",
    "ModelError",
    "ResourceError",
    "TundishError",
    "UsageError",
    "Watcher",
    "build",
    "interpret",
    "list_recipes",
    "load_graph",
    "load_recipe",
    "plan_job",
    "verify_again",
]

# Public name -> the module it lives in.
_HOMES = {
    "Choices": "tundish.job",
    "GateError": "converters.errors",
    "ModelError": "converters.errors",
    "ResourceError": "converters.errors",
    "TundishError": "converters.errors",
    "UsageError": "converters.errors",
    "Watcher": "tundish.watcher",
    "build": "tundish.job",
    "interpret": "converters.interpret",
    "list_recipes": "tundish.recipe",
    "load_graph": "converters.load",
    "load_recipe": "tundish.recipe",
    "plan_job": "tundish.job",
    "verify_again": "tundish.recheck",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
