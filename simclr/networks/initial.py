"""Initial weights as pure functions of (seed, name of the parameter, element), the same bits on every machine.

A generator's stream is not enough for that: `nn.init.trunc_normal_` draws other values in torch 2.11 than in 2.15 from the same seed, and
each draw shifts all later ones. Here every weight has an address in `simclr.keyed`, so an encoder's weights do not depend on the head,
loss or classifier beside it. Only +, −, ×, ÷, √ and exact operations on bits turn a uniform deviate into a normal one: IEEE 754 fixes
their results, while log and exp differ between processors and versions of numpy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr import keyed

Module = TypeVar("Module", bound=nn.Module)

# Rational approximations of the normal quantile, lowest power first: M. J. Wichura, "Algorithm AS 241: the percentage points of
# the normal distribution", Applied Statistics 37 (1988), routine PPND16. Of its three regions the last begins at a probability
# of e^-25, which 32 random bits never reach.
# fmt: off
_MIDDLE = (
    (3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
     45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727),
    (1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077,
     21213.794301586595867, 39307.895800092710610, 28729.085735721942674, 5226.4952788528545610),
)
_TAIL = (
    (1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
     1.27045825245236838258, 0.241780725177450611770, 0.0227238449892691845833, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550,
     0.148103976427480074590, 0.0151986665636164571966, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)
# fmt: on
_LN2, _SQRT_HALF = 0.69314718055994530942, 0.70710678118654752440
_ATANH = tuple(1 / (2 * k + 1) for k in range(11))  # of atanh(s) / s in s²; where s² < 0.03 the next term is below 1e-17

_INSIDE_TWO = 0.95449973610364158560
"""Φ(2) − Φ(−2), the share of a normal distribution within two standard deviations."""
_STD_INSIDE_TWO = 0.87962566103423978
"""Standard deviation of a standard normal distribution that is cut at ±2."""
_CHUNK = 1 << 15
"""Weights that are drawn at a time: some arrays of 8 bytes a weight fit in a core's cache together. A multiple of 4."""


def normal_quantile(q: NDArray[np.float64]) -> NDArray[np.float64]:
    """z with Φ(z) = 1/2 + q, to a few units of the 16th digit, for |q| ≤ 1/2 − e^-25. q is (n,), and counts from the middle, so that both
    tails are equally fine."""
    tails = np.flatnonzero(np.abs(q) > 0.425)
    z = _ratio(0.180625 - q * q, _MIDDLE)
    z *= q
    beyond = q[tails]
    p = 0.5 - np.abs(beyond)
    assert not len(p) or p.min() > 1.4e-11
    z[tails] = np.copysign(_ratio(np.sqrt(-_log(p)) - 1.6, _TAIL), beyond)
    return z


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln x: of x = m 2^e with m from √½ to √2, e ln 2 + 2 atanh((m − 1) / (m + 1))."""
    m, e = np.frexp(x)
    small = m < _SQRT_HALF
    m = np.where(small, m + m, m)
    s = (m - 1) / (m + 1)
    log: NDArray[np.float64] = (e - small) * _LN2 + 2 * s * _polynomial(s * s, _ATANH)
    return log


def _ratio(x: NDArray[np.float64], of: tuple[tuple[float, ...], tuple[float, ...]]) -> NDArray[np.float64]:
    y = _polynomial(x, of[0])
    y /= _polynomial(x, of[1])
    return y


def _polynomial(x: NDArray[np.float64], coefficients: tuple[float, ...]) -> NDArray[np.float64]:
    """By Horner's rule, one rounding for each operation: a fused multiply-add would round once for two."""
    y = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        y += coefficient
        y *= x
    y += coefficients[0]
    return y


def deviates(seed: int, name: str, start: int, stop: int, cut: bool) -> NDArray[np.float64]:
    """Elements `start` to `stop` of the parameter `name` as standard normal deviates, with `cut` within two standard deviations.

    Element i is the quantile at (word + 1/2) / 2^32, of word i % 4 at `keyed`'s address (seed, "weights", CRC-32 of the name,
    i // 4). So the uncut ones reach 6.3 standard deviations.
    """
    q = _centred(seed, name, start, stop)
    if cut:
        q *= _INSIDE_TWO
    return normal_quantile(q)


def _centred(seed: int, name: str, start: int, stop: int) -> NDArray[np.float64]:
    """(word + 1/2) / 2^32 − 1/2 of the words of these elements: uniform between −1/2 and 1/2."""
    first = start // 4
    ids = np.arange(first, -(-stop // 4), dtype=np.int64)
    words = keyed.bits(seed, "weights", zlib.crc32(name.encode()), ids, 0, 4).reshape(-1)[start - 4 * first : stop - 4 * first]
    q = words.astype(np.float64)
    q -= 2.0**31 - 0.5  # exact, as the next line is
    q *= 2.0**-32
    return q


@dataclass(frozen=True, slots=True)
class Law:
    """How the elements of a parameter are distributed about 0."""

    kind: Literal["normal", "cut", "uniform"]
    """cut = a normal within two standard deviations."""
    scale: float
    """Standard deviation, of a cut one before the cut; or the bound of a uniform one."""


def simclr_law(name: str, layer: nn.Module) -> Law:
    """Convolutions: TensorFlow's VarianceScaling() as in the official code, a normal cut at two standard deviations, with variance
    1 / fan-in after the cut. Linear maps: N(0, 0.01²)."""
    if isinstance(layer, nn.Conv2d):
        return Law("cut", 1 / (math.sqrt(layer.weight[0].numel()) * _STD_INSIDE_TWO))
    return Law("normal", 0.01)


def haiku_law(name: str, layer: nn.Module) -> Law:
    """A normal with standard deviation 1 / √fan-in, cut at two of them, so that 0.88 / √fan-in is left: how Haiku's linear maps begin."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return Law("cut", 1 / math.sqrt(layer.weight[0].numel()))


class Conv2d(nn.Conv2d):
    """torch's Conv2d with uninitialised weights: torch's constructor would draw some from its global generator. After construction, call
    `draw` or load the weights."""

    def reset_parameters(self) -> None:
        """Draws nothing."""


class Linear(nn.Linear):
    """torch's Linear with uninitialised weights, as `Conv2d`."""

    def reset_parameters(self) -> None:
        """Draws nothing."""


def draw(module: nn.Module, seed: int, prefix: str, law: Callable[[str, nn.Module], Law] = simclr_law) -> None:
    """Fill every convolution and linear map in `module` with initial weights in float32, by the law of (its name in `module`, itself);
    biases get 0. Tensors on the meta device stay as they are, and so does torch's generator.

    `prefix` stands before the names in `module`, as in "encoder.stem.0.weight". Elements are counted row by row of the logical shape.
    Raises ValueError for a seed that no config could hold.
    """
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for _, layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    fill([(".".join(part for part in (prefix, path, "weight") if part), layer.weight, law(path, layer)) for path, layer in layers], seed)


def draw_uniform(module: nn.Module, seed: int, prefix: str) -> None:
    """As `draw`, but weights and biases of linear maps are uniform within ±1 / √fan-in, as torch's own constructor has them."""
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    parameters = [(f"{path}.{name}", p, layer) for path, layer in layers for name, p in layer.named_parameters(recurse=False)]
    fill([(f"{prefix}.{name.lstrip('.')}", p, Law("uniform", 1 / math.sqrt(layer.in_features))) for name, p, layer in parameters], seed)


def fill(parameters: Iterable[tuple[str, Tensor, Law]], seed: int) -> None:
    """Fill each parameter (its whole name, itself, its law), as `draw` does. Neither threads (torch's number) nor chunks change a bit."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"the seed of the initial weights is {seed}; expected a whole number from 0 to 2^63 - 1")
    jobs: list[Callable[[], None]] = []
    filled: list[tuple[Tensor, NDArray[np.float32]]] = []
    for name, parameter, law in parameters:
        if parameter.is_meta:
            continue
        weight = parameter.detach()
        own = type(weight) is Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
        values = weight.numpy() if own else np.empty(weight.shape, dtype=np.float32)
        if not own:
            filled.append((weight, values))
        flat = values.reshape(-1)
        jobs += [partial(_fill, flat, seed, name, at, law) for at in range(0, flat.size, _CHUNK)]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()
    for weight, values in filled:
        weight.copy_(torch.from_numpy(values))


def _fill(flat: NDArray[np.float32], seed: int, name: str, start: int, law: Law) -> None:
    stop = min(start + _CHUNK, flat.size)
    if law.kind == "uniform":
        z = _centred(seed, name, start, stop)
        z *= 2 * law.scale
    else:
        z = deviates(seed, name, start, stop, law.kind == "cut")
        z *= law.scale
    flat[start:stop] = z


def unfilled(build: Callable[[], Module]) -> Module:
    """The module that `build` makes, on the CPU, with uninitialised tensors, for callers that load all of its state."""
    with torch.device("meta"):
        module = build()
    return module.to_empty(device="cpu")
