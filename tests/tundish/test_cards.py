"""Model cards: what the Hub reads of them, what people read, and whether what they say to run does run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from converters.errors import ModelError
from exporters.base import Target
from exporters.registry import EXPORTERS
from tests.tundish.test_report import gate
from tests.tundish.test_report import manifest as report_manifest
from tundish.cards import model_card
from tundish.manifest_file import read_manifest
from tundish.source_card import SourceCard, licence_files, read_source_card

FIGURES = {"kl_mean": 0.125, "kl_p99": 1.5, "top1": 0.75, "perplexity": 20.5, "reference_perplexity": None}


def manifest(verification: Mapping[str, object] | None, **source: object) -> dict[str, Any]:
    made = report_manifest(verification)
    made["source"] |= {"licence_name": None, "licence_link": None, "languages": []} | source
    return made | {"calibration": None}


def gguf_card(verification: Mapping[str, object] | None, **source: object) -> str:
    return model_card(manifest(verification, **source), "gguf", EXPORTERS[Target.GGUF].card)


def test_the_hub_finds_what_it_wants() -> None:
    link = "https://example.org/a#b: c"
    text = gguf_card(None, licence="other", licence_name="ünï: 'x'", licence_link=link, languages=["en", "no"])
    data = ModelCard(text).data.to_dict()
    assert data == {
        "base_model": "owner/tiny",
        "base_model_relation": "quantized",
        "language": ["en", "no"],
        "library_name": "gguf",
        "license": "other",
        "license_name": "ünï: 'x'",
        "license_link": link,
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", "ollama", "quantized", "int4_g32"],
    }
    nameless = ModelCard(gguf_card(None, repo_id=None, revision=None)).data.to_dict()
    assert nameless.keys() == {"library_name", "pipeline_tag", "tags"}, "nothing is claimed that the source does not"


def test_figures_are_those_of_the_manifest() -> None:
    assert "**Not verified**: this artifact was built without verification" in gguf_card(None)
    gates = [gate("kl", False, 0.125, 0.1, "64 positions"), gate("stops", True)]
    result = {"passed": False, "versions": {"r": "9"}, "divergence": FIGURES | {"positions": 64}, "gates": gates}
    text = gguf_card({"gguf": result})
    assert "| 0.125 | 1.5 | 75.0 % | 20.50 | – |" in text and "(r 9)" in text
    assert "| kl | FAILED | 0.125 | 0.1 | 64 positions |" in text and "| stops | passed |  |  |  |" in text
    absent: dict[str, object] = {
        "passed": None,
        "versions": {},
        "divergence": None,
        "gates": [gate("runtime", None, detail="x missing")],
    }
    text = gguf_card({"gguf": absent})
    assert "**Not verified**: its runtime was not there." in text and "| runtime | not judged |" in text


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\nlanguage: en\n---\n", SourceCard("mit", languages=("en",))),
        ("---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---\n", SourceCard("other", "x", "LICENSE")),
        ("---\nlicense: [mit]\nlanguage: [en, 7, '']\n---\n", SourceCard(languages=("en",))),
        ("---\nlicense: 'a\u0007b'\n---\n", SourceCard()),
        ("---\nlicense: {{\n---\n", SourceCard()),
        ("# for people\nlicense: mit", SourceCard()),
    ],
)
def test_what_the_source_states(tmp_path: Path, card: str, expected: SourceCard) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_source_card(tmp_path) == expected


@pytest.mark.parametrize(
    "head",
    [
        "a0: &a0 {x0: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 9}*a{n - 1}]}}\n" for n in range(1, 12)),
        "a: " + "[" * 3000,
        'license: !!int ""',
        'license: !!float "_"',
    ],
)
def test_a_hostile_card_states_nothing_and_ends(tmp_path: Path, head: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    assert read_source_card(tmp_path) == SourceCard()


def test_licences_go_along(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    names = ("LICENSE", "LICENSE.md", "LICENSE-APACHE", "Notice.txt", "licensing.py", "README.md")
    for name in names:
        (folder / name).write_text(name)
    assert licence_files(folder) == {name: name.encode() for name in names[:4]}
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="outside of its folder"):
        licence_files(folder)


@pytest.mark.parametrize(("count", "nbytes"), [(17, 1), (5, 1 << 18)])
def test_licences_without_end(tmp_path: Path, count: int, nbytes: int) -> None:
    for number in range(count):
        with (tmp_path / f"LICENSE-{number}").open("wb") as file:
            file.truncate(nbytes)
    with pytest.raises(ModelError, match=rf"too many files of licences.*found {count} files"):
        licence_files(tmp_path)
    (tmp_path / "LICENSE-0").unlink()
    assert len(licence_files(tmp_path)) == count - 1


def test_a_licence_that_nests_without_end() -> None:
    deep = "[" * 5000
    assert ModelCard(gguf_card(None, licence="other", licence_name=deep)).data.to_dict()["license_name"] == deep


def test_every_container_has_a_card(poured: Path) -> None:
    for target, entry in read_manifest(poured)["targets"].items():
        card = ModelCard.load(poured / target / "README.md")
        assert card.data.to_dict()["license"] == "mit" and target in card.data.to_dict()["tags"]
        assert f"{entry['bytes'] / 1e6:,.1f} MB" in card.text


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", "mlx"])
def test_what_the_card_says_to_run_runs(poured: Path, target: str) -> None:
    text = (poured / target / "README.md").read_text()
    if code := re.search(r"```python\n(.*?)```", text, re.DOTALL):
        command = [sys.executable, "-c", code[1]]
    else:
        prompt = re.search(r"^    mlx_lm\.generate (--model \. --prompt) '(.*)'$", text, re.MULTILINE)
        assert prompt is not None
        command = [sys.executable, "-m", "mlx_lm", "generate", *prompt[1].split(), prompt[2]]
    run = subprocess.run(command, cwd=poured / target, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0 and run.stdout.strip(), run.stderr
