"""Numba's list of what a function was compiled for, read so that a lost key does no harm. Import it for its effect.

A dispatcher keeps its compiled versions in an OrderedDict, by the types of the arguments. In some whole runs of the tests (numba 0.68.1)
its `values()` raised KeyError for one of its own keys, and from then on each time. The cause is not known. Ruled out: hash seeds, a second
thread that compiles, garbage collection, overloads registered meanwhile, dtype pointers, dispatchers' finalizers. The dict inside, which
is read without a look-up, has the versions still, so the order is made anew from it.
"""

from __future__ import annotations

import warnings
from typing import Any

from numba.core.dispatcher import Dispatcher


def _signatures(self: Any) -> list[Any]:
    try:
        versions = list(self.overloads.values())
    except KeyError as error:
        inside = dict.items(self.overloads)
        kept = [hash(key) for key, _ in inside if key == error.args]
        versions = [version for _, version in inside]
        warnings.warn(
            f"numba lost a key, please report this: {error.args} of {self}, which has {len(versions)} and {kept} of it; hash "
            f"{hash(error.args)}, found {error.args in self.overloads}",
            RuntimeWarning,
            2,
        )
        items = list(inside)
        self.overloads.clear()
        self.overloads.update(items)
    return [version.signature for version in versions if not version.objectmode]


Dispatcher.nopython_signatures = property(_signatures)  # type: ignore[method-assign, assignment]
