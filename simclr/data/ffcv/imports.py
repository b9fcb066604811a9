"""Import FFCV in half the time. Modules that use FFCV import this one first, for its effect.

FFCV keeps the names of its two image modes in a numba typed dict, and the first such dict of a process costs 2.2 s of
compiling: more than all its other imports together, in every worker and every command. The dict is only ever read while
Python code builds closures, so a plain one serves.
"""

from __future__ import annotations

import numba.typed
import torch

import simclr.data.ffcv.signatures  # noqa: F401  (for its effect)

_threads = torch.get_num_threads()  # which FFCV sets to 1 when it is imported
_typed_dict = numba.typed.Dict
numba.typed.Dict = dict
try:
    import ffcv.fields.rgb_image
finally:
    numba.typed.Dict = _typed_dict
    torch.set_num_threads(_threads)

IMAGE_MODES: dict[str, int] = ffcv.fields.rgb_image.IMAGE_MODES
