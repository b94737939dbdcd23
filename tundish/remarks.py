"""What people should hear of a model before a build: what is read otherwise than files say, and what may go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from converters.config_keys import listed
from converters.json_file import Json, read_json
from converters.tokenizer import Tokenizer
from exporters.base import Model
from tundish.chat_renderer import chat_renderer
from tundish.recipe import Recipe

_MORE_TEMPLATES = "additional_chat_templates"  # transformers 5's folder for named ones


def remarks(model: Model, folder: Path) -> tuple[str, ...]:
    """Sentences for the plan, the terminal and the manifest; `folder` is the checkpoint's."""
    config = model.graph.config
    return (*config.notes, *_stop_remarks(model.tokenizer), *_template_remarks(model.tokenizer, folder))


def _stop_remarks(tokenizer: Tokenizer) -> Iterator[str]:
    text = _text_of(_stated(tokenizer, "eos_token"))
    index = next((index for index, token in enumerate(tokenizer.tokens) if text and token.text == text), None)
    if index is not None and index not in tokenizer.eos_ids:
        stops = ", ".join(f"{tokenizer.tokens[each].text!r} ({each})" for each in tokenizer.eos_ids)
        yield (
            f"the tokenizer's eos_token {text!r} ({index}) is none of the ids that stop generation: {stops}; "
            "answers that end by it go on. eos_token_id in generation_config.json mends that"
        )


def _stated(tokenizer: Tokenizer, key: str) -> Json:
    """What the tokenizer's files state, in the order in which transformers reads them."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in tokenizer.files and (value := read_json(tokenizer.files[name]).get(key)) is not None:
            return value
    return None


def _text_of(token: Json) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _template_remarks(tokenizer: Tokenizer, folder: Path) -> Iterator[str]:
    names = sorted(path.stem for path in (folder / _MORE_TEMPLATES).glob("*.jinja"))
    templates = _stated(tokenizer, "chat_template")
    if isinstance(templates, list):
        stated = [item.get("name") for item in templates if isinstance(item, dict)]
        names += [name for name in stated if isinstance(name, str) and name not in ("default", *names)]
    if names:
        left = listed(names)
        default = "none is called default" if tokenizer.chat_template is None else "the default one alone is converted"
        yield f"of the model's chat templates {default}; left out: {left}"


def try_template(model: Model, recipe: Recipe) -> None:
    """Render what verification asks, if there is a template: ModelError tells the template's own error at once, before
    a runtime meets it."""
    if model.tokenizer.chat_template is None:
        return
    questions = dict.fromkeys(recipe.verify.for_target(target).answer.prompt for target in recipe.targets)
    with chat_renderer(model.tokenizer) as render:
        for question in questions:
            render([{"role": "user", "content": question}], True)
