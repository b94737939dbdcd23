"""From an openvino.Model without numbers to the two files of an IR: the XML, and where each constant lies in the .bin.

OpenVINO's own serializer writes the XML. The weights' Constants all look at one buffer of zeros while it does, and the
.bin that it writes is thrown away; the offsets are then replaced by ours. No weight is read, and none is ever held
whole.
"""

from __future__ import annotations

import html
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov

from converters.errors import ResourceError
from exporters.openvino.storage import Stored

# Constants start on cache lines, as in the files that OpenVINO writes.
ALIGNMENT = 64

_CONST = re.compile(
    r'(name="(?P<name>[^"]*)" type="Const" version="opset1">\s*<data [^>]*?)'
    r'offset="(?P<offset>\d+)" size="(?P<size>\d+)" />'
)


class ZeroConstants:
    """Constants of any shape over one shared buffer of zeros, which the operating system never has to allocate.

    A model with these constants lives no longer than this object: OpenVINO does not keep the buffer alive.
    """

    def __init__(self, parts: Sequence[Stored]) -> None:
        self.parts = parts
        self._zeros = np.zeros(max(part.nbytes for part in parts), np.uint8)

    def __call__(self, part: Stored) -> ov.Output:
        tensor = ov.Tensor(self._zeros[: part.nbytes], ov.Shape(part.shape), getattr(ov.Type, part.type))
        constant = ov.op.Constant(tensor, shared_memory=True)
        constant.set_friendly_name(part.name)
        return constant.output(0)


@dataclass(frozen=True, slots=True)
class Ir:
    """`offsets` of the stored parts in the .bin by name; `fixed` are the (offset, bytes) of all other constants."""

    xml: bytes
    nbytes: int
    offsets: dict[str, int]
    fixed: tuple[tuple[int, bytes], ...]


def place_constants(model: ov.Model, constants: ZeroConstants) -> Ir:
    """Serialize `model` and lay out its .bin: first the small constants, then the stored parts in order."""
    parts = constants.parts
    offsets = {part.name: 0 for part in parts}
    small = {
        node.get_friendly_name(): np.ascontiguousarray(node.data).tobytes()
        for node in model.get_ordered_ops()
        if isinstance(node, ov.op.Constant) and node.get_friendly_name() not in offsets
    }
    fixed: dict[bytes, int] = {}
    end = 0
    for content in dict.fromkeys(small.values()):
        fixed[content] = end
        end = _align(end + len(content))
    for part in parts:
        offsets[part.name] = end
        end = _align(end + part.nbytes)
    places = offsets | {name: fixed[content] for name, content in small.items()}
    sizes = {part.name: part.nbytes for part in parts} | {name: len(content) for name, content in small.items()}
    xml = _with_places(_xml(model), places, sizes)
    return Ir(xml.encode(), end, offsets, tuple((at, data) for data, at in fixed.items()))


def name_helpers(model: ov.Model) -> None:
    """Names for the nodes that have none: OpenVINO's own are counted over the life of the process."""
    for index, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            node.set_friendly_name(f"{node.get_type_name()}_{index}")


def _xml(model: ov.Model) -> str:
    """The serializer's XML; its .bin, a copy of every constant of zeros that has another size, goes nowhere.

    When it cannot write, the serializer deletes both files. So it gets a link, and never the name of the null device.
    """
    with scratch_errors("the network's description"), tempfile.TemporaryDirectory() as folder:
        path, sink = Path(folder, "model.xml"), Path(folder, "model.bin")
        sink.symlink_to(os.devnull)
        ov.serialize(model, path, sink)
        xml = path.read_text(encoding="utf-8")
        if not xml.rstrip().endswith("</net>"):
            raise OSError("the file is cut off")
    return xml


@contextmanager
def scratch_errors(what: str) -> Iterator[None]:
    """ResourceError where `what` cannot be written to a temporary folder below."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ResourceError(
            f"{what} cannot be written",
            where=tempfile.tempdir or "temporary folder",
            found=str(error).strip() or type(error).__name__,
            mend="Free a few megabytes there, or set TMPDIR to a folder with space.",
        ) from error


def _with_places(xml: str, places: Mapping[str, int], sizes: Mapping[str, int]) -> str:
    """The XML with the offset of each Const layer, found by its name, replaced. The sizes must be the ones expected."""
    found: list[str] = []

    def replace(match: re.Match[str]) -> str:
        name = html.unescape(match["name"])
        assert int(match["size"]) == sizes[name], f"{name} has {match['size']} bytes, not {sizes[name]}"
        found.append(name)
        return f'{match[1]}offset="{places[name]}" size="{match["size"]}" />'

    replaced = _CONST.sub(replace, xml)
    assert sorted(found) == sorted(places), f"constants not found once each in the XML: {set(places) ^ set(found)}"
    return replaced


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
