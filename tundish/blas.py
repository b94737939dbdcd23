"""Matrix products that come to the same numbers on machines with few cores and with many.

OpenBLAS, which numpy brings, splits a product or a factorization between its threads, and sums run in another order
where the parts are others: with one thread and with two, a tenth of the shapes tried gave other last bits, and a
quantizer that rounds may then choose another code. So calibration computes with one number of threads everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

BLAS_THREADS = 2  # as fast as any number on two cores, and no machine that matters has fewer


@contextmanager
def fixed_blas() -> Iterator[None]:
    """Have numpy's products use BLAS_THREADS threads, however many cores there are and whatever the environment says.

    Apple's Accelerate, which numpy may use on a Mac, has no such setting.
    """
    with threadpool_limits(limits=BLAS_THREADS, user_api="blas"):
        yield
