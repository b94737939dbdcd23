"""From a model's name to the Model that exporters take: graph with schemes, tokenizer, context, licence."""

from __future__ import annotations

from pathlib import Path

from converters.errors import UsageError
from converters.generation import read_generation
from converters.load import load_graph
from converters.passes.assign import assign_schemes
from converters.passes.context import for_context
from converters.quantize.ggml.mixes import Mix
from converters.source import Source, resolve_source
from converters.tokenizer import read_tokenizer
from exporters.base import Model
from tundish.recipe import Recipe
from tundish.source_card import read_source_card

SAMPLE = "sample"


def find_source(model: str, revision: str | None) -> Source:
    """The checkpoint folder of a path, a Hub id or the word `sample`, downloaded or made if need be."""
    if not model.strip():
        raise UsageError("no model given", expected="a folder, a Hub id or `sample`", found=repr(model))
    try:
        name = Path(model).expanduser().resolve().name
    except (OSError, RuntimeError, ValueError) as error:  # the home folder of nobody, links in a circle, a NUL
        expected = "a folder, a Hub id or `sample`"
        raise UsageError("no such model", where=repr(model), expected=expected, found=str(error)) from error
    try:
        name.encode()
    except UnicodeEncodeError as error:  # it is written into artifacts and manifests
        raise UsageError("the folder's name is not UTF-8", where=repr(model), mend="Rename the folder.") from error
    if model == SAMPLE:
        from tundish.sample import cached_sample  # its dependencies are needed for the sample alone

        return Source(SAMPLE, cached_sample(), None, None)
    return resolve_source(model, revision)


def open_model(source: Source, recipe: Recipe) -> Model:
    """Read headers, configuration and tokenizer, and assign the recipe's schemes. No weight is read."""
    graph = load_graph(source.folder)
    longest = graph.config.context_length
    context = longest if recipe.context == "full" else min(recipe.context, longest)
    default = recipe.schemes.default
    graph = assign_schemes(graph, default, recipe.schemes.overrides, recipe.calibration.is_on)
    return Model(
        graph=for_context(graph, context),
        tokenizer=read_tokenizer(source.folder, graph.config),
        context_length=context,
        name=source.name.rstrip("/").rsplit("/", 1)[-1],
        licence=read_source_card(source.folder).licence,
        sampling=read_generation(source.folder).sampling,
        mix=default.name if isinstance(default, Mix) else None,
    )
