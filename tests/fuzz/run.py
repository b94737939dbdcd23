"""Fuzzes one parser for some minutes: python -m tests.fuzz.run --parser NAME --minutes M [--corpus DIR]

atheris (libFuzzer) follows which lines of tundish an input reaches and keeps what reaches new ones; tests.fuzz.mutate
makes inputs worse as their format has it. libFuzzer ends the run at an exception that is no TundishError, at one that
takes over 5 s, or where the process needs 1 GiB, and writes that input into the corpus folder as crash-, timeout- or
oom-*. Mend it, and put the input into tests/data/fuzz/NAME. Without atheris (it has wheels for Linux alone) inputs are
drawn without guidance, under the same limits.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import resource
import sys
import time
from pathlib import Path
from random import Random

CORPUS = Path(__file__).resolve().parents[1] / "data" / "fuzz"
SECONDS, RSS_MB = 5, 1024


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--parser", required=True)
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="where new inputs go")
    given = arguments.parse_args()
    folder = given.corpus / given.parser
    folder.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("atheris"):
        guided(given.parser, given.minutes, given.seed, folder)
    else:
        unguided(given.parser, given.minutes, given.seed, folder)


class Figures:
    """Of a run, printed at its end and now and then."""

    def __init__(self, parser: str) -> None:
        self.parser, self.inputs, self.taken, self.longest, self.begun = parser, 0, 0, 0.0, time.monotonic()

    def count(self, accepted: bool, seconds: float) -> None:
        self.inputs += 1
        self.taken += accepted
        self.longest = max(self.longest, seconds)
        if self.inputs % 1000 == 0:
            self.show()

    def show(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{self.parser}: {self.inputs} inputs, {self.taken} accepted, {time.monotonic() - self.begun:.0f} s, "
            f"longest {self.longest:.2f} s, peak RSS {peak:.0f} MiB",
            flush=True,
        )


def guided(name: str, minutes: float, seed: int, folder: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["converters", "exporters", "tundish"]):
        from tests.fuzz.parsers import PARSERS, accepted
    parser, figures = PARSERS[name], Figures(name)
    for seed_name, data in parser.seeds().items():
        (folder / seed_name).write_bytes(data)

    def one(data: bytes) -> None:
        start = time.monotonic()
        figures.count(accepted(parser, data), time.monotonic() - start)

    def mutator(data: bytes, most: int, number: int) -> bytes:
        random = Random(number)
        return parser.mutate(data, random)[:most] if random.random() < 0.8 else atheris.Mutate(data, most)

    known = CORPUS / name
    atheris.Setup(
        [
            "fuzz", f"-max_total_time={minutes * 60:.0f}", f"-timeout={SECONDS}", f"-rss_limit_mb={RSS_MB}",
            "-max_len=131072", f"-seed={seed}", f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=0",
            str(folder), *([str(known)] if known.is_dir() else []),
        ],
        one,
        custom_mutator=mutator,
    )  # fmt: skip
    atheris.Fuzz()


def unguided(name: str, minutes: float, seed: int, folder: Path) -> None:
    """Exits with status 1 at the first finding, whose input is in the folder then."""
    from tests.fuzz.parsers import PARSERS, accepted

    parser, figures, random = PARSERS[name], Figures(name), Random(seed)
    known = [path.read_bytes() for path in (CORPUS / name).glob("*")]
    seeds = [*parser.seeds().values(), *known]
    while time.monotonic() < figures.begun + minutes * 60:
        data = random.choice(seeds)
        for _ in range(random.choice((1, 1, 2, 4))):
            data = parser.mutate(data, random)
        (folder / "current").write_bytes(data)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        start = time.monotonic()
        figures.count(accepted(parser, data), time.monotonic() - start)
        faulthandler.cancel_dump_traceback_later()
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10 > RSS_MB:
            sys.exit(f"more than {RSS_MB} MiB: see {folder / 'current'}")
    figures.show()


if __name__ == "__main__":
    main()
