"""Prose that every CPython of one version carries: what models are calibrated with by default.

The language reference behind help() (pydoc_data.topics), and what modules of the standard library that no distribution
splits off say about themselves, without examples. It differs between versions of Python, and shares nothing with the
held-out text.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from converters.errors import UsageError

# Those with the most prose, on many subjects. A version of Python that has one no longer goes without it.
MODULES = (
    "argparse ast asyncio.base_events asyncio.events asyncio.locks asyncio.protocols asyncio.streams asyncio.tasks "
    "base64 bdb cmd code codecs concurrent.futures._base configparser datetime difflib doctest email.charset "
    "email._header_value_parser email._policybase email.header email.headerregistry email.message email.policy enum "
    "fileinput ftplib functools http.client http.cookiejar http.server imaplib inspect ipaddress json json.decoder "
    "logging logging.handlers lzma mimetypes optparse os pdb pickle pkgutil platform random re shutil smtplib socket "
    "socketserver ssl statistics subprocess tarfile tempfile textwrap this threading timeit tokenize traceback typing "
    "unittest.case unittest.mock urllib.parse urllib.request uuid wave wsgiref.handlers xml.etree.ElementTree "
    "xml.sax.handler xml.sax.xmlreader xmlrpc.client xmlrpc.server zipfile _pydecimal _pyio"
)
LEAST = 200  # characters: shorter docstrings are not sentences enough
NAME = f"Python's documentation ({len(MODULES.split())} modules and pydoc_data.topics)"


def documentation() -> Iterator[str]:
    """Its texts, subjects mixed as their names sort. UsageError for a Python that carries no sources."""
    from pydoc_data import topics  # half a megabyte that only calibration needs

    texts = {name: [text] for name, text in topics.topics.items()} | {
        name: _docstrings(name) for name in MODULES.split()
    }
    for name in sorted(texts, key=lambda name: (name.casefold(), name)):
        yield from texts[name]


def _docstrings(module: str) -> list[str]:
    """A module's docstrings, its own first, as far as they are prose."""
    tree = ast.parse(_source(module))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    texts = [_prose(docstring) for docstring in docstrings]
    return [text for text in texts if len(text) >= LEAST]


def _source(module: str) -> str:
    """A module's source, from the library's own folder: importing would find the user's modules of these names."""
    library = Path(sysconfig.get_path("stdlib"))
    path = library.joinpath(*module.split("."))
    found = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    if not found and not (library / "os.py").is_file():
        raise UsageError(
            "this Python has no documentation to calibrate with",
            where=str(library),
            expected="the sources of its standard library",
            mend="Name a text of your own, or install Python with them.",
        )
    return found[0].read_text(encoding="utf-8") if found else ""


def _prose(docstring: str) -> str:
    """Paragraphs of a docstring that are neither examples nor indented, each ended by an empty line."""
    paragraphs = docstring.split("\n\n")
    return "".join(f"{each}\n\n" for each in paragraphs if ">>>" not in each and not each.startswith("    "))
