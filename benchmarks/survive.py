"""What a build leaves when it is killed, or when its disk is full: nothing wrong, and the same command goes on. And
whether it comes to the same bytes in another world.

python -m benchmarks.survive kill --model sample --moments 50
python -m benchmarks.survive late --model sample --recipe phi35-best-int4
python -m benchmarks.survive disk --model sample --sizes 20     (as root: mounts a tmpfs)
python -m benchmarks.survive same --model sample --recipe phi35-best-int4

A build that nothing disturbs says what is right. `kill` sends SIGKILL at random moments of further ones, half of them
while they write, then runs the same command again; --out may hold an earlier build; a build that ends before its kill
does not count. `late` kills one build when --fraction of its time is over, and says how much of that time is spent
again. `disk` builds into a tmpfs of random size in which an earlier artifact is, and then --filled times into one with
room, the rest of which another process takes meanwhile: a build that has its files' space reserved by then ends well.
`same` builds with one thread and with two, from two checkouts of tundish, with other locales, time zones, hash seeds,
file modes, copies of the model and empty caches, and compares every file.
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
    before, out = work / "before", work / "out"
    if not before.exists():
        narrow = argparse.Namespace(**{**vars(options), "recipe": options.earlier})
        undisturbed(narrow, before, False)
    earlier, counts = digests(before), Counter({"wrong": 0})
    for moment in range(options.moments):
        verified = moment < options.verified
        right, seconds = rights[verified]
        earliest, writes = options.kernels, bool(moment % 2)
        latest = seconds if verified or not writes else options.writing
        while True:
            shutil.rmtree(out, ignore_errors=True)
            if chance.random() < 0.5:
                shutil.copytree(before, out)
            had = digests(out)
            after = chance.uniform(0 if writes else earliest, latest)
            if killed(command(options, out, verified), work if writes else None, after):
                break
            counts["ended before"] += 1
        then = digests(out)
        counts["killed"] += 1
        counts["wrong"] += then not in (had, right)
        again = run(command(options, out, verified))
        counts["wrong"] += again.returncode != 0 or digests(out) != right
        counts["went on"] += "taken over" in again.stderr
        counts["verification kept"] += "was verified" in again.stderr
        left = [path.name for path in work.iterdir() if path.name.startswith(".out")]
        counts["left behind"] += bool(left)
        began = "into writing" if writes else "of"
        print(f"{moment + 1}: {after:.1f} s {began} {seconds:.1f} s, {dict(counts)}", file=sys.stderr, flush=True)
    assert earlier == digests(before)
    return dict(counts)


def killed(line: list[str], writing: Path | None, after: float) -> bool:
    """Start a build and kill it some seconds after its start, or after it began `writing` beside its place there.

    False if it had ended by then.
    """
    build = start(line)
    while writing is not None and build.poll() is None and not list(writing.glob(".out.*.partial")):
        time.sleep(0.002)
    try:
        build.wait(after)
    except subprocess.TimeoutExpired:
        os.kill(build.pid, signal.SIGKILL)
    return build.wait() == -signal.SIGKILL


def late(options: argparse.Namespace) -> dict[str, float | bool]:
    """Seconds of a whole build, with verification, and of one that was killed and then run again."""
    work = options.work.absolute()
    caches = [work / name for name in ("cache", "cache-of-killed")]
    for cache in caches:
        shutil.rmtree(cache, ignore_errors=True)
    os.environ["TUNDISH_CACHE"] = str(caches[0])
    right, whole = undisturbed(options, work / "right", True)
    os.environ["TUNDISH_CACHE"] = str(caches[1])
    out, after = work / "out", options.fraction * whole
    shutil.rmtree(out, ignore_errors=True)
    if not killed(command(options, out, True), None, after):
        sys.exit("the build had ended before its kill: this machine is too busy to measure")
    begun = time.perf_counter()
    again = run(command(options, out, True), check=True)
    rest = time.perf_counter() - begun
    print(again.stderr, file=sys.stderr)
    redone = after + rest - whole
    return {"whole": whole, "killed after": after, "rest": rest, "redone": redone, "redone of whole": redone / whole,
            "equal": digests(out) == right}  # fmt: skip


def same(options: argparse.Namespace) -> dict[str, int]:
    """Counts of files in the builds of two worlds: `differ` must be 0."""
    work, locale = options.work.absolute(), "tr_TR.UTF-8"  # in which I is not i's capital, and 0,5 is a half
    here = Path(__file__).resolve().parents[1]
    locales, there = work / "locales", work / "checkout"
    locales.mkdir(exist_ok=True)
    run(["localedef", "-i", "tr_TR", "-f", "UTF-8", str(locales / locale)], check=True)
    shutil.rmtree(there, ignore_errors=True)
    run(["git", "clone", "--quiet", str(here), str(there)], check=True)
    built = []
    for threads, root, zone, language in ((1, here, "Asia/Kathmandu", locale), (2, there, "UTC", "C")):
        world = work / f"world {threads}"
        shutil.rmtree(world, ignore_errors=True)
        model = world.joinpath(*["model"] * threads)
        shutil.copytree(options.model, model, copy_function=shutil.copyfile)
        blas = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
        variables = blas | {"TZ": zone, "LC_ALL": language, "LANG": language, "LOCPATH": str(locales)}
        variables |= {"PYTHONPATH": str(root), "PYTHONHASHSEED": str(threads), "TUNDISH_CACHE": str(world / "cache")}
        line = command(argparse.Namespace(**{**vars(options), "model": str(model)}), world / "out", True)
        line += ["--threads", str(threads)]
        with (world / "log").open("w") as log:
            subprocess.run(  # noqa: S603  # our own line, no shell
                line,
                env=os.environ | variables,
                cwd=root,
                umask=0o077 * (threads % 2),
                check=True,
                stderr=log,
                stdout=log,
            )
        built.append(digests(world / "out") or {})
    one, other = built
    differing = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
    print("\n".join(differing), file=sys.stderr)
    return {"files": len(one), "differ": len(differing)}


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
    parser.add_argument("what", choices=["kill", "late", "disk", "same"])
    parser.add_argument("--work", type=Path, default=Path("build/bench/survive"))
    parser.add_argument("--model", default="sample")
    parser.add_argument("--recipe", default="phi35-all-int4")
    parser.add_argument("--earlier", default="phi35-all-fp16", help="what --out may hold before")
    parser.add_argument("--target", action="append", default=[], help="as of tundish build")
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--verified", type=int, default=0, help="of the moments: builds that verify")
    parser.add_argument("--fraction", type=float, default=0.9, help="of a build's time, after which `late` kills it")
    parser.add_argument("--sizes", type=int, default=20)
    parser.add_argument("--filled", type=int, default=0, help="further builds whose room is taken meanwhile")
    parser.add_argument("--kernels", type=float, default=0.0, help="seconds at the beginning in which nothing is hit")
    parser.add_argument("--writing", type=float, default=2.0, help="seconds in which a build writes and publishes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"kill": kill, "late": late, "disk": disk, "same": same}[options.what](options)))


if __name__ == "__main__":
    main()
