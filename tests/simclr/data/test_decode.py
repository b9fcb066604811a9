"""How threads share the photographs of a batch. `test_loader` checks their pixels."""

from __future__ import annotations

import numba
import numpy as np

from simclr.data.ffcv.decode import _take


def test_threads_take_one_photograph_after_another_and_each_once() -> None:
    """Together, in any number: the counter is one for all of them, and no number is given twice."""

    @numba.njit(parallel=True)
    def times_taken(rows: int, threads: int) -> np.ndarray:
        counter, times = np.zeros(1, np.int64), np.zeros((threads, rows), np.int64)
        for thread in numba.prange(threads):
            row = _take(counter)
            while row < rows:
                times[thread, row] += 1
                row = _take(counter)
        return times

    numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
    assert (times_taken(200_000, 4).sum(0) == 1).all()
