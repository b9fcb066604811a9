"""Numba's list of what a function was compiled for."""

from __future__ import annotations

import numba
import numpy as np
import pytest

import simclr.data.ffcv.signatures  # noqa: F401  (for its effect)


def test_a_key_that_numba_lost_is_said_and_does_no_harm() -> None:
    """As in some whole runs of these tests: `overloads.values()` raises KeyError, in that dispatcher from then on."""
    inner = numba.njit(lambda x: x + 1)
    inner(np.zeros(2, np.uint8))
    inner(np.zeros(2, np.uint16))
    types = next(iter(inner.overloads))
    version = dict.pop(inner.overloads, types)  # the dict's own: OrderedDict keeps its node
    with pytest.raises(KeyError):
        list(inner.overloads.values())
    with pytest.warns(RuntimeWarning, match="numba lost a key, please report this"):
        assert len(inner.nopython_signatures) == 1
    assert version not in inner.overloads.values() and len(inner.overloads) == 1  # the order is whole again
    outer = numba.njit(lambda x: inner(x)[0])
    assert outer(np.full(2, 7, np.uint8)) == 8 and len(inner.overloads) == 2
