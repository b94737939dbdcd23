"""Reads files, and writes a folder's files once more: `python -m benchmarks.copy COPY FOLDER READ...`."""

from __future__ import annotations

import sys
from pathlib import Path

CHUNK_NBYTES = 8 << 20


def main() -> None:
    copy, folder, *sources = map(Path, sys.argv[1:])
    buffer = memoryview(bytearray(CHUNK_NBYTES))
    for source in sources:
        with source.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = copy / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
            while count := reader.readinto(buffer):
                writer.write(buffer[:count])


if __name__ == "__main__":
    main()
