"""What a build leaves when it is killed, or when its disk is full: nothing wrong, and the same command goes on.

python -m benchmarks.survive kill --model sample --moments 50
python -m benchmarks.survive disk --model sample --sizes 20     (as root: mounts a tmpfs)

A build that nothing disturbs says what is right. `kill` sends SIGKILL at random moments of further ones, half of them
while they write, then runs the same command again; --out may hold an earlier build. `disk` builds into a tmpfs of
random size in which an earlier artifact is, and then --filled times into one with room, the rest of which another
process takes meanwhile: a build that has its files' space reserved by then ends well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_FULL = 5
_NEED = re.compile(r"expected [\d,]+ bytes")


def command(options: argparse.Namespace, out: Path, verified: bool = False) -> list[str]:
    line = [sys.executable, "-m", "tundish", "build", options.recipe, "--model", options.model, "--out", str(out)]
    line += [part for target in options.target for part in ("--target", target)]
    return line if verified else [*line, "--no-verify"]


def run(line: list[str], check: bool = False) -> subprocess.CompletedProcess[str]:
    """A command, with what it said."""
    return subprocess.run(line, capture_output=True, text=True, check=check)  # noqa: S603  # our own lines, no shell


def start(line: list[str], said: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """A command that goes on."""
    return subprocess.Popen(line, stderr=said, stdout=subprocess.DEVNULL, text=True)  # noqa: S603  # as above


def digests(folder: Path) -> dict[str, str] | None:
    """SHA-256 of every file; None if the folder is not there."""
    if not folder.is_dir():
        return None
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def undisturbed(options: argparse.Namespace, out: Path, verified: bool) -> tuple[dict[str, str], float]:
    """What a build comes to, and its seconds."""
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    run(command(options, out, verified), check=True)
    seconds, found = time.perf_counter() - begun, digests(out)
    assert found is not None
    return found, seconds


def kill(options: argparse.Namespace) -> dict[str, int]:
    """Counts of what was found at the moments: `wrong` must be 0."""
    work, chance = options.work.absolute(), random.Random(options.seed)  # noqa: S311  # moments, no secrets
    rights = {False: undisturbed(options, work / "right", False)}
    if options.verified:
        rights[True] = undisturbed(options, work / "verified", True)
    before = work / "before"
    if not before.exists():
        narrow = argparse.Namespace(**{**vars(options), "recipe": options.earlier})
        undisturbed(narrow, before, False)
    earlier, counts = digests(before), Counter({"wrong": 0})
    for moment in range(options.moments):
        verified = moment < options.verified
        right, seconds = rights[verified]
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        if chance.random() < 0.5:
            shutil.copytree(before, out)
        had = digests(out)
        after = chance.uniform(options.kernels, seconds)
        build = start(command(options, out, verified))
        if moment % 2:  # half of them while the artifacts are written, verified and published
            while build.poll() is None and not list(work.glob(".out.*.partial")):
                time.sleep(0.002)
            after = chance.uniform(0, seconds if verified else options.writing)
        try:
            build.wait(after)
            counts["ended before"] += 1
        except subprocess.TimeoutExpired:
            os.kill(build.pid, signal.SIGKILL)
            build.wait()
        then = digests(out)
        counts["wrong"] += then not in (had, right)
        again = run(command(options, out, verified))
        counts["wrong"] += again.returncode != 0 or digests(out) != right
        counts["went on"] += "taken over" in again.stderr
        counts["verification kept"] += "was verified" in again.stderr
        left = [path.name for path in work.iterdir() if path.name.startswith(".out")]
        counts["left behind"] += bool(left)
        began = "into writing" if moment % 2 else "of"
        print(f"{moment + 1}: {after:.1f} s {began} {seconds:.1f} s, {dict(counts)}", file=sys.stderr, flush=True)
    assert earlier == digests(before)
    return dict(counts)


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Take all the space that is left."""
    with path.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            return


def disk(options: argparse.Namespace) -> dict[str, int]:
    """Counts: `refused with 5` and `names the need` must be all but what ended before, `earlier intact` must be all."""
    work, chance = options.work.absolute(), random.Random(options.seed)  # noqa: S311  # sizes, no secrets
    right, seconds = undisturbed(options, work / "right", False)
    need = sum(path.stat().st_size for path in (work / "right").rglob("*") if path.is_file())
    counts = Counter({"refused with 5": 0, "names the need": 0, "earlier intact": 0})
    mount = work / "disk"
    for index in range(options.sizes + options.filled):
        filled = index >= options.sizes  # the plan fits, and then somebody else takes the space
        room = need + (64 << 20) if filled else int(need * chance.uniform(0.02, 0.98))
        with small_disk(mount, need + room):
            shutil.copytree(work / "right", mount / "out")
            after = chance.uniform(options.kernels, seconds) if filled else 0.0
            build = start(command(options, mount / "out"), subprocess.PIPE)
            if filled:
                filling(mount, build, after)
            said = build.communicate()[1]
            ended = build.returncode
            if filled and ended == 0:
                counts["ended before the disk was full"] += 1
            counts["refused with 5"] += ended == DISK_FULL
            counts["names the need"] += bool(_NEED.search(said))
            counts["earlier intact"] += digests(mount / "out") == right
            counts["left behind"] += any(path.name.startswith(".out") for path in mount.iterdir())
            what = f"{room:,} bytes{', then filled' if filled else ''}"
            print(f"{index + 1}: {what}: {ended}, {dict(counts)}", file=sys.stderr, flush=True)
    return dict(counts)


def filling(mount: Path, build: subprocess.Popen[str], after: float) -> None:
    """Take the space some time into the build, before its files have theirs reserved, as far as that can be hit."""
    try:
        build.wait(after)
    except subprocess.TimeoutExpired:
        fill(mount / "other")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survive", description="Kills builds and fills disks.")
    parser.add_argument("what", choices=["kill", "disk"])
    parser.add_argument("--work", type=Path, default=Path("build/bench/survive"))
    parser.add_argument("--model", default="sample")
    parser.add_argument("--recipe", default="phi35-all-int4")
    parser.add_argument("--earlier", default="phi35-all-fp16", help="what --out may hold before")
    parser.add_argument("--target", action="append", default=[], help="as of tundish build")
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--verified", type=int, default=0, help="of the moments: builds that verify")
    parser.add_argument("--sizes", type=int, default=20)
    parser.add_argument("--filled", type=int, default=0, help="further builds whose room is taken meanwhile")
    parser.add_argument("--kernels", type=float, default=0.0, help="seconds at the beginning in which nothing is hit")
    parser.add_argument("--writing", type=float, default=2.0, help="seconds in which a build writes and publishes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(json.dumps(kill(options) if options.what == "kill" else disk(options)))


if __name__ == "__main__":
    main()
