"""Any network of timm's as the encoder f(.): `--encoder.timm NAME`. The only door to timm, which is imported when a network is built."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simclr.errors import UserError
from simclr.extras import command
from simclr.networks.batchnorm import BatchNorm

_CHANCES = ("p", "drop_prob", "prob", "drop_rate")
"""What torch's and timm's modules call the probability that they leave something out."""


class TimmEncoder(nn.Module):
    """Images (n, 3, H, W) → representations h (n, d_h), with d_h in `.d_h`: timm's network `name` in `.model`, under timm's own names.

    It differs from `timm.create_model(name, num_classes=0)` in this:
    - its BatchNorms are ours, over all ranks or those of `norm_ranks`; they keep timm's momentum and eps, and their running variance is the
      biased one, where torch's is unbiased;
    - nothing is left out by chance: dropout, drop path and the like are 0 whatever timm has, since all randomness here is keyed;
    - parameters that h does not depend on are not trained.

    A network that has a fixed size of input is built for `size_px`; where a method shows it crops of `small_px` too, with timm's
    `dynamic_img_size`, by which its weights and what it computes at `size_px` are the same. It pools as timm's default for it has it, which
    is stated by name.
    Initial weights are drawn as timm does, from a generator of their own that `seed` sets: the same on every rank, whatever was
    drawn before, and torch's global generator stays as it is. Unlike our networks' they depend on the versions of torch and timm.

    Raises UserError for a name that timm has not, for images that the network cannot take, and for one without a vector per image.
    """

    def __init__(self, name: str, size_px: int, norm_ranks: int | None = None, seed: int = 0, small_px: int | None = None) -> None:
        super().__init__()
        self._found = looked_at(name, size_px, small_px)
        self.name, self.d_h, self.pretrained_cfg = name, self._found.d_h, self._found.pretrained_cfg
        self.model = _without_chance(_drawn(name, self._found.arguments, seed))
        for parameter, p in self.model.named_parameters():
            if parameter in self._found.unused:
                p.requires_grad_(False)
        for module in list(self.model.modules()):
            for child, norm in list(module.named_children()):
                if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    setattr(module, child, _ours(norm, norm_ranks, name))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.model(x)
        return h

    def depths(self) -> dict[str, int]:
        """The depth of each parameter by timm's own grouping: 0 is the stem, and it grows block by block; what it does not name has a last
        one to itself. Raises UserError for a network that timm does not group."""
        require_grouped(self.name, self._found)
        from timm.models import group_parameters

        model: Any = self.model  # nn.Module knows no method of timm's
        found = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        return {f"model.{name}": depth for name, depth in found.items()}

    # Private in torch: what `to_empty` and `to` call on every module. The public way it waits for is a hook of `to_empty`. A test builds a
    # network with such buffers on the meta device.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TimmEncoder:
        """A network that leaves the meta device gets its values from a state dict, which lacks some buffers, as tables of relative
        positions: those are made anew."""
        meta = any(t.is_meta for t in self.parameters())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if meta and self._found.derived and not any(t.is_meta for t in self.parameters()):
            with torch.device("cpu"), torch.no_grad():
                made = dict(_drawn(self.name, self._found.arguments, 0).named_buffers())
                for name, there in self.model.named_buffers():
                    if name in self._found.derived:
                        there.copy_(made[name])
        return self


class NormAct(BatchNorm):
    """BatchNorm with the activation behind it, as timm's BatchNormAct2d."""

    def __init__(self, channels: int, act: nn.Module, ranks: int | None) -> None:
        super().__init__(channels, ranks=ranks)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(super().forward(x))
        return y


@dataclass(frozen=True, slots=True)
class Found:
    """What a network of timm's is, seen on the meta device."""

    arguments: dict[str, Any]
    """Of `timm.create_model`, beside the name."""
    d_h: int
    unused: frozenset[str]
    """Parameters that h does not depend on."""
    derived: frozenset[str]
    """Buffers that no state dict has."""
    normalises: bool
    """Whether it has BatchNorms."""
    grouped: bool
    """Whether timm says the order of its blocks."""
    pretrained_cfg: dict[str, Any]
    """What timm says of the network: its input, mean and std that its own weights want, the names of its first and last layers."""


@functools.lru_cache(maxsize=32)
def looked_at(name: str, size_px: int, small_px: int | None = None) -> Found:
    """Timm's network `name` for images of `size_px`, and small crops of `small_px` if there are some, from one pass forward and backward on
    the meta device, without memory. Raises UserError as `TimmEncoder` does."""
    create = _door(name)
    with torch.device("meta"):
        arguments: dict[str, Any] = {"pretrained": False, "num_classes": 0}
        try:
            network = create(name, **arguments)
            arguments["global_pool"] = pooling(network) or "avg"
            try:
                network = create(name, **arguments, img_size=size_px)
                arguments["img_size"] = size_px
            except TypeError as error:  # most take any size and know no such argument
                if "img_size" not in str(error):
                    raise
                network = create(name, **arguments)
        except Exception as error:  # whatever timm's constructors raise
            raise UserError(f"timm cannot build {name} for images of {size_px} px: {_first_line(error)}; {_OTHER}") from None
        _without_chance(network)
        embed = getattr(network, "patch_embed", None)
        patch = getattr(embed, "patch_size", None)
        # Patches that overlap fit any size.
        cut = getattr(getattr(embed, "proj", None), "stride", patch) == patch
        for field, side_px in (("views.size_px", size_px), ("local.size_px", small_px if small_px and cut else size_px)):
            if isinstance(patch, tuple) and any(isinstance(side, int) and side_px % side for side in patch):
                raise UserError(
                    f"encoder.timm {name} cuts images into patches of {patch[0]} px, and {field} is {side_px}; give a multiple of it"
                )
        if small_px and _takes(network, size_px) and not _takes(network, small_px):
            with contextlib.suppress(TypeError):  # of a network that knows no such argument, as most of a fixed size
                network = _without_chance(create(name, **arguments, dynamic_img_size=True))
                arguments["dynamic_img_size"] = True
            if not _takes(network, small_px):
                raise UserError(
                    f"encoder.timm {name} takes images of {size_px} px alone, and the small crops have {small_px}; give --local.crops 0 or "
                    "another network"
                )
        random = _Random()
        try:
            with random:
                h = network.train()(torch.empty(2, 3, size_px, size_px))
        except Exception as error:
            raise UserError(f"encoder.timm {name} cannot take images of {size_px} px: {_first_line(error)}; {_OTHER}") from None
        if not isinstance(h, Tensor) or h.ndim != 2 or len(h) != 2:
            shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise UserError(f"encoder.timm {name} gives {shape} for 2 images, expected a vector for each, (2, d); {_OTHER}")
        if random.drawn:
            raise UserError(f"encoder.timm {name} draws at random while it is trained ({random.drawn}), which nothing here keys; {_OTHER}")
        h.sum().backward()
    derived = {buffer for buffer, _ in network.named_buffers()} - set(network.state_dict())
    unused = (parameter for parameter, p in network.named_parameters() if p.grad is None)
    normalises = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    grouped = hasattr(network, "group_matcher")
    return Found(arguments, h.shape[1], frozenset(unused), frozenset(derived), normalises, grouped, dict(network.pretrained_cfg))


def _takes(network: nn.Module, size_px: int) -> bool:
    """Whether a network on the meta device gives a vector for each image of `size_px`."""
    try:
        h = network(torch.empty(2, 3, size_px, size_px, device="meta"))
    except Exception:  # whatever timm's networks raise
        return False
    return isinstance(h, Tensor) and h.ndim == 2


_OTHER = "give another size (--views.size-px) or another network"


def require_grouped(name: str, found: Found) -> None:
    """Raise UserError unless timm says the order of the blocks of network `name`, which rates that shrink block by block want."""
    if not found.grouped:
        raise UserError(f"optim.layer_decay goes by the order of blocks, which timm does not say of {name}; leave --optim.layer-decay out")


def pooling(network: nn.Module) -> str:
    """How a network of timm's pools, by timm's word for it: avg, token, map; "" if it does not say."""
    for part in (network, getattr(network, "head", None)):
        pool = getattr(part, "global_pool", None)
        word = pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
        if isinstance(word, str) and word:
            return word
    return ""


def plain(name: str, size_px: int) -> nn.Module:
    """What `timm.create_model` gives for `name`: timm's own network without anything of ours, in evaluation mode."""
    return _drawn(name, looked_at(name, size_px).arguments, 0).eval()


def call(name: str, size_px: int) -> str:
    """The line of Python that builds timm's own network."""
    given = ", ".join(f"{key}={value!r}" for key, value in looked_at(name, size_px).arguments.items() if key != "pretrained")
    return f"timm.create_model({name!r}, {given})"


def version() -> str:
    """Of timm, which is installed."""
    import timm

    return str(timm.__version__)


def _door(name: str) -> Any:
    """timm's `create_model`, after a look at the name. Raises UserError where timm is not installed, or has no such network."""
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UserError(f"encoder.timm {name} wants timm, which is not installed here: {command('timm')}") from None
    known = timm.list_models()
    if name in known:
        return timm.create_model
    base, _, tag = name.partition(".")
    if base in known:
        raise UserError(
            f"encoder.timm {name} names weights ({tag}), and a network begins with drawn ones; give --encoder.timm {base}, "
            "and --start FILE for weights"
        )
    near = difflib.get_close_matches(name, known, 3, 0.5)
    raise UserError(
        f"timm has no network {name[:100]!r}; " + (f"the nearest are {', '.join(near)}" if near else "timm.list_models() has all")
    )


def _drawn(name: str, arguments: dict[str, Any], seed: int) -> nn.Module:
    """timm's network with its initial weights of `seed`."""
    digest = hashlib.sha256(f"{seed} timm".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        network: nn.Module = _door(name)(name, **arguments)
    return network


def _without_chance(network: nn.Module) -> nn.Module:
    for module in network.modules():
        for name in _CHANCES if "Drop" in type(module).__name__ else ("drop_rate",):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return network


class _Random(TorchDispatchMode):
    """Looks for operations that draw from torch's generator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn = self.drawn or str(func)
        return func(*args, **(kwargs or {}))


def _ours(norm: nn.modules.batchnorm._BatchNorm, ranks: int | None, name: str) -> BatchNorm:
    """Our BatchNorm with the parameters, the statistics and the activation of `norm`."""
    kind, act = type(norm).__name__, getattr(norm, "act", None)
    lacks = norm.weight is None or norm.running_mean is None or norm.running_var is None
    if kind not in ("BatchNorm1d", "BatchNorm2d", "BatchNormAct2d") or lacks:
        kind += " without weights or statistics" if lacks else ""
        raise UserError(f"encoder.timm {name} has a {kind}, for which there is no form over all workers; give another network")
    made = NormAct(norm.num_features, act, ranks) if isinstance(act, nn.Module) else BatchNorm(norm.num_features, ranks=ranks)
    assert norm.running_mean is not None and norm.running_var is not None
    made.weight, made.bias = norm.weight, norm.bias
    made.running_mean, made.running_var = norm.running_mean, norm.running_var
    made.momentum, made.eps = 0.1 if norm.momentum is None else norm.momentum, norm.eps
    return made.train(norm.training)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
