"""Numba's list of what a function was compiled for."""

from __future__ import annotations

import numba
import numpy as np
import pytest

import simclr.data.ffcv.signatures  # noqa: F401  (for its effect)


def test_an_order_that_numba_lost_does_no_harm() -> None:
    """As in some whole runs of these tests: `overloads.values()` raises KeyError, in that dispatcher from then on."""
    inner = numba.njit(lambda x: x + 1)
    inner(np.zeros(2, np.uint8))
    inner(np.zeros(2, np.uint16))
    assert [str(found.args[0].dtype) for found in inner.nopython_signatures] == ["uint8", "uint16"]
    types = next(iter(inner.overloads))
    dict.pop(inner.overloads, types)  # the dict's own: OrderedDict keeps its node
    with pytest.raises(KeyError):
        list(inner.overloads.values())
    assert len(inner.nopython_signatures) == 1
    outer = numba.njit(lambda x: inner(x)[0])
    assert outer(np.full(2, 7, np.uint8)) == 8 and len(inner.nopython_signatures) == 2
