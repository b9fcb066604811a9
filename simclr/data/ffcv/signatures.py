"""Numba's list of what a function was compiled for, read so that a damaged order does no harm. Import it for its effect.

A dispatcher keeps its compiled versions in an OrderedDict, by the types of the arguments. In some whole runs of the tests (numba 0.68.1)
the order of such a dict was damaged: `values()` raised KeyError for one of its own keys, or ran in a circle for ever, which took the
memory of the machine. The cause is not known. Ruled out: hash seeds, a second thread that compiles, garbage collection, overloads
registered meanwhile, dtype pointers, dispatchers' finalizers. The dict inside has the versions, in the same order, and is read without a
look-up.
"""

from __future__ import annotations

from typing import Any

from numba.core.dispatcher import Dispatcher


def _signatures(self: Any) -> list[Any]:
    return [version.signature for version in dict.values(self.overloads) if not version.objectmode]


Dispatcher.nopython_signatures = property(_signatures)  # type: ignore[method-assign, assignment]
