"""The Dask cluster that a matrix runs on: a scheduler's workers, or this process as its own only worker."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from converters.errors import UsageError
from tundish.disk import disk_errors

if TYPE_CHECKING:
    from distributed import Client

MEMORY = "MEMORY"  # the resource that workers declare, in bytes, as Dask's documentation calls it
_OWN = "127.0.0.1:0"  # a port that is free: Dask opens one, and by default to everybody
_SHARE = 0.9  # of the free memory that builds may take
_CONNECT = "10s"
_WAIT = 30  # seconds for the first worker
_START = f"dask worker SCHEDULER --nthreads 2 --resources {MEMORY}=64e9"


def require_dask() -> None:
    """UsageError unless Dask is installed."""
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise UsageError("tundish matrix needs Dask", found=str(error), mend="pip install 'tundish[dask]'") from error


def parse_memory(text: str) -> int:
    """Bytes of a size such as 16GB or 24GiB, as Dask reads it. UsageError if it is none."""
    require_dask()
    from dask.utils import parse_bytes

    try:
        nbytes = int(parse_bytes(text))
    except ValueError as error:
        raise UsageError("--memory is no size", expected="such as 16GB or 24GiB", found=text) from error
    if nbytes <= 0:
        raise UsageError("--memory is no size", expected="such as 16GB or 24GiB", found=text)
    return nbytes


@contextmanager
def connected(scheduler: str | None, memory: int | None, cells: int) -> Iterator[Client]:
    """A client of the scheduler, or of one in this process whose only worker is this process too, with so much memory
    for so many cells. UsageError if there is no Dask or no scheduler."""
    require_dask()
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster
    from distributed.system import MEMORY_LIMIT

    with ExitStack() as stack:
        stack.enter_context(dask.config.set({"distributed.comm.timeouts.connect": _CONNECT}))
        if scheduler is not None:
            try:
                client = stack.enter_context(Client(scheduler, timeout=_CONNECT, set_as_default=False))
            except (OSError, TimeoutError, ValueError) as error:
                mend = "Start `dask scheduler`, or give the address that it prints."
                raise UsageError("no Dask scheduler answers", where=scheduler, found=str(error), mend=mend) from error
            yield client
            return
        memory = memory or int(_SHARE * min(psutil.virtual_memory().available, MEMORY_LIMIT))
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=1,
                threads_per_worker=min(cells, CPU_COUNT),
                processes=False,
                memory_limit=None,  # of this process, which does nothing but wait
                dashboard_address=_OWN,
                worker_dashboard_address=_OWN,
                silence_logs=logging.ERROR,
                resources={MEMORY: memory},
            )
        )
        yield stack.enter_context(Client(cluster, set_as_default=False))


def require_workers(client: Client, scheduler: str | None, out: Path, folders: list[str]) -> int:
    """The memory of the worker that declares most, in bytes. UsageError unless all see the same folders and are of one
    version."""
    from tundish.matrix_worker import facts

    if scheduler is not None:
        try:
            client.wait_for_workers(1, timeout=_WAIT)
        except TimeoutError as error:
            raise UsageError("the scheduler has no workers", where=scheduler, mend=f"Start some: {_START}") from error
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out, prefix=".tundish-") as marker:
            found = client.run(facts, [marker.name, *folders], on_error="return")
    for address, fact in found.items():
        if isinstance(fact, Exception):
            raise UsageError("a worker cannot run tundish", where=address, found=repr(fact), mend="Install it there.")
        if fact["unseen"]:
            unseen = out if Path(fact["unseen"][0]).parent == out else fact["unseen"][0]
            raise UsageError(
                "a worker does not see a folder",
                where=address,
                found=f"no {unseen} there",
                mend="Give all workers one file system under the same names, or name models by their Hub ids.",
            )
        if fact["tundish"] != version("tundish"):
            expected = version("tundish")
            raise UsageError("a worker has another tundish", where=address, expected=expected, found=fact["tundish"])
    declared = [worker["resources"].get(MEMORY, 0) for worker in client.scheduler_info()["workers"].values()]
    if not any(declared):
        raise UsageError("no worker declares its memory", where=str(scheduler), mend=f"Start them so: {_START}")
    return int(max(declared))
