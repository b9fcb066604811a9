"""Collectives with gradient. Without a process group every function is the identity, so callers need no special case."""

from __future__ import annotations

import functools
import inspect
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from simclr.compiling import compiled
from simclr.errors import UserError
from simclr.shares import share, shares
from simclr.telemetry.device_time import Timestamp, exact, now

_GROUPED = {"nccl": "cuda", "gloo": "cpu"}  # backends whose ranks may have further groups, and where their tensors are
_MOST_BYTES = 1 << 20  # of a value that ranks exchange as JSON
# The option's name since torch 2.13, and before.
_NO_BUFFERS = next(o for o in ("forward_sync_buffers", "broadcast_buffers") if o in inspect.signature(DistributedDataParallel).parameters)


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """W, the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(x: Tensor, images: int | None = None) -> Tensor:
    """(n, ...) on each rank → (W n, ...) on every rank, in rank order.

    Where W does not divide a batch, say how many `images` it has, of which each rank holds its `share`: x has as many rows for each image
    of this rank (two views: two), and the result for all. Without them, every rank has as many rows as this one.

    The gradient of a rank's rows is the *sum* of the gradients from every rank's loss. With a loss that is a mean over the local rows,
    weighted by `share_of_mean`, and DDP's average over ranks, the parameters then get the exact gradient of the global mean.
    (`torch.distributed.all_gather` has no gradient: built on it, a loss has the right value and 1/W of the cross terms.)
    """
    if world_size() == 1:
        return x
    gathered: Tensor
    if images is None or images % world_size() == 0:
        gathered = _AllGather.apply(x)
    else:
        gathered = _AllGatherUneven.apply(x, images, _rows_per_image(x, images))
    return gathered


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of `x` over the ranks of `group`, or over all; `x` needs no gradient. In place if there is a process group; returns it."""
    if world_size() > 1:
        began = _wait_begins(x)
        dist.all_reduce(x, group=group)
        _wait_ends(x, began)
    return x


def rows_of_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(m,) on each rank of `group` → (ranks, m), a row for each; `x` needs no gradient."""
    out = x.new_empty((group.size(), len(x)))
    began = _wait_begins(x)
    dist.all_gather_into_tensor(out, x[None], group=group)
    _wait_ends(x, began)
    return out


def own_group(size: int) -> dist.ProcessGroup | None:
    """A new process group of this rank and its neighbours, `size` ranks in a row, whose collectives do not wait behind those of others:
    NCCL runs the calls of one group one after another, so sums that backward needs at once would wait for the gradients before them.

    It has the timeout of the group of all ranks, and ends with it. Every rank must call this, in the same order, and then the collectives
    of both groups in one order, as NCCL asks of several communicators: a network's layers have it. None where there is nobody to exchange
    with, and on backends other than NCCL and gloo, where all ranks share their one group.
    """
    world, whole = world_size(), dist.group.WORLD
    if size == 1 or whole is None or world == 1:
        return None
    backend = dist.get_backend()
    if world % size or (size < world and backend not in _GROUPED):
        raise UserError(f"BatchNorm over groups of {size} of {world} ranks on {backend}; expected a divisor, on {' or '.join(_GROUPED)}")
    if backend not in _GROUPED:
        return None
    # Without a timeout a new group has the backend's default, on NCCL ten minutes. Torch has no public name for that of a group.
    timeout = whole._get_backend(torch.device(_GROUPED[backend])).options._timeout
    first = rank() // size * size
    group = dist.new_group(range(first, first + size), timeout=timeout, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # this rank is a member
    return group


def broadcast(x: Tensor) -> Tensor:
    """Rank 0's `x`, which needs no gradient, on every rank: in place if there is a process group; returns it."""
    if world_size() > 1:
        began = _wait_begins(x)
        dist.broadcast(x, src=0)
        _wait_ends(x, began)
    return x


def means_and_rows(values: Tensor, row: list[float]) -> tuple[list[float], list[list[float]]]:
    """Means over ranks of `values` (m,), and every rank's `row` as (W, len(row)), in one collective.

    The rows are exact: each rank adds zeros to the others'. The host waits for the device here.
    """
    table = values.new_zeros(world_size(), len(row), dtype=torch.float64)
    table[rank()] = torch.tensor(row, dtype=torch.float64)
    both = all_reduce_sum(torch.cat([values.detach().double(), table.flatten()])).tolist()
    rows, width = both[len(values) :], len(row)
    return [v / world_size() for v in both[: len(values)]], [rows[at : at + width] for at in range(0, len(rows), width)]


def every_ranks(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on every rank: what JSON gives back as it was, at most 1 MiB of it.

    Torch's own collectives of objects pickle, and to read a pickle runs the code of whoever sent it. Raises RuntimeError on every rank if
    one sends too much, or what is no JSON; the rank that has such a value raises the reason, as a TypeError.
    """
    mine, wrong = _mine(value)
    if world_size() == 1:
        return [_read(mine, 0)]
    sizes = mine.new_empty(world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(sizes, mine.new_tensor([mine.numel()], dtype=torch.int64))
    if wrong is not None:
        raise wrong
    lengths = _require_small(sizes)
    padded = mine.new_zeros(max(lengths))
    padded[: mine.numel()] = mine
    every = mine.new_empty(world_size() * padded.numel())
    dist.all_gather_into_tensor(every, padded)
    rows = zip(every.chunk(world_size()), lengths, strict=True)
    return [_read(row[:length], sender) for sender, (row, length) in enumerate(rows)]


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over ranks of a detached copy of `values`."""
    return all_reduce_sum(values.detach().clone()) / world_size()


def first_row(x: Tensor, images: int | None = None) -> int:
    """Where this rank's rows `x` begin among those that `all_gather` joins."""
    if images is None or images % world_size() == 0:
        return rank() * len(x)
    before: int = share(images, rank(), world_size()).start
    return _rows_per_image(x, images) * before


def share_of_mean(mean: Tensor, own: int, images: int | None = None) -> Tensor:
    """A `mean` over the `own` of `images` images that this rank holds → its share of the mean over all, W · own / images of it: the mean
    of all ranks' shares is the mean over all images. The mean itself where W divides the images, or None are said."""
    return mean if images is None or images % world_size() == 0 else mean * (own * world_size() / images)


def from_rank_zero(value: Any) -> Any:
    """Rank 0's `value` on every rank; as in `every_ranks` it is JSON, and an error on every rank if it is none."""
    mine, wrong = _mine(value if rank() == 0 else None)
    if world_size() == 1:
        return _read(mine, 0)
    size = mine.new_tensor([mine.numel()], dtype=torch.int64)
    dist.broadcast(size, src=0)
    if wrong is not None:
        raise wrong
    (length,) = _require_small(size)
    sent = mine if rank() == 0 else mine.new_empty(length)
    dist.broadcast(sent, src=0)
    return _read(sent, 0)


def _mine(value: Any) -> tuple[Tensor, Exception | None]:
    """`value` as it is sent. If it cannot be sent, nothing is, which every rank refuses, and why: the other ranks already wait for a size.
    Without other ranks that is raised."""
    try:
        return _written(value), None
    except Exception as error:
        if world_size() == 1:
            raise
        return _bytes(b""), error


def _written(value: Any) -> Tensor:
    """`value` as JSON, in bytes."""
    try:
        text = json.dumps(value)
        same = json.loads(text) == value
    except (ValueError, RecursionError) as error:  # it contains itself
        raise TypeError(f"a value is not what JSON gives back: {error}") from None
    if not same:  # a tuple, a key that is a number, a NaN: other ranks would get something else
        raise TypeError(f"{value!r} is not what JSON gives back")
    return _bytes(text.encode())


def _bytes(text: bytes) -> Tensor:
    """(length of `text`,), where the process group's tensors are."""
    on_host = not dist.is_initialized() or dist.get_backend() == "gloo"
    there = None if on_host else torch.accelerator.current_accelerator()
    found = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    return found.to(there or torch.device("cpu"))


def _read(sent: Tensor, sender: int) -> Any:
    text = bytes(sent.tolist())
    try:
        return json.loads(text)
    except ValueError:  # of its bytes or of its syntax
        raise RuntimeError(f"rank {sender} sent {text[:40]!r}, {len(text):,} bytes that are no JSON") from None


def _require_small(sizes: Tensor) -> list[int]:
    found: list[int] = sizes.tolist()
    for sender, size in enumerate(found):
        if not 0 < size <= _MOST_BYTES:
            raise RuntimeError(f"rank {sender} sends {size:,} bytes; expected 1 to {_MOST_BYTES:,}")
    return found


def data_parallel(model: nn.Module, bucket_mib: float, compress: bool, compile: bool = False) -> nn.Module:
    """`model`, wrapped so that a backward pass averages its gradients over ranks; without a process group it is not wrapped.

    Gradients travel in buckets of `bucket_mib` while the backward pass goes on; `compress` sends them as bfloat16. Statistics
    of BatchNorm are global already, so there are no buffers to send. With `compile` the wrapper's forward pass is compiled;
    `model` itself stays as it is, for evaluation.
    """
    # Compiled inside DDP: torch splits the graph at full buckets either way, and DDP's own Python would be split into ten pieces.
    inner: Any = compiled(model) if compile else model
    if world_size() == 1:
        return inner  # type: ignore[no-any-return]
    # DDP's average is the second half of the exact gradient; the sum in `all_gather` is the first.
    buffers: dict[str, Any] = {_NO_BUFFERS: False}
    network = DistributedDataParallel(inner, bucket_cap_mb=bucket_mib, gradient_as_bucket_view=True, **buffers)
    if compress:
        network.register_comm_hook(None, bf16_compress_hook)
    # The first layer's gradient is computed last. After it, the backward pass only waits for the other ranks.
    first = next(p for p in model.parameters() if p.requires_grad)
    first.register_post_accumulate_grad_hook(_gradients_ready)
    return network


# ── How long ranks wait for each other ─────────────────────────────────────────────────────────────────────────────────
# In a synchronous step every rank takes as long as the slowest. Only the waits in collectives show which rank that is. Collectives inside
# a compiled graph cannot be timed: see `simclr.telemetry.timing.Pace`.

Wait = tuple[Timestamp, Timestamp]
"""When a rank entered a collective, and when it had the result."""

_waits: list[Wait] | None = None  # recorded since the last `take_waits`; None = not recording
_ready: Timestamp | None = None


def take_waits(go_on: bool = True) -> list[Wait]:
    """This rank's waits since the last call. The first call starts the recording, one without `go_on` ends it."""
    global _waits
    found, _waits = _waits or [], [] if go_on else None
    return found


def gradients_met(device: torch.device) -> None:
    """Call it after a backward pass: records how long this rank, with its own gradients ready, waited for the other ranks."""
    global _ready
    if _ready is not None and _waits is not None:
        _waits.append((_ready, now(device)))
    _ready = None


def _gradients_ready(parameter: Tensor) -> None:
    global _ready
    if _waits is not None and exact(parameter.device):
        _ready = now(parameter.device)


def _wait_begins(x: Tensor) -> Timestamp | None:
    return now(x.device) if not torch.compiler.is_compiling() and _waits is not None and exact(x.device) else None


def _wait_ends(x: Tensor, began: Timestamp | None) -> None:
    if began is not None and _waits is not None:
        _waits.append((began, now(x.device)))


def _rows_per_image(x: Tensor, images: int) -> int:
    own = shares(images, world_size())[rank()]
    if not own or len(x) % own:
        raise ValueError(f"{len(x)} rows on rank {rank()} of {world_size()}; expected as many for each of its {own} of {images} images")
    return len(x) // own


@functools.lru_cache(maxsize=16)
def _places(images: int, each: int, world: int, device: torch.device) -> Tensor:
    """(images · each,) where every row stands in the ranks' rows, one behind the other, each rank's filled up to the most that one has."""
    row = torch.arange(images * each, device=device)
    of = ((row // each + 1) * world - 1) // images  # the last rank whose share begins at the row's image or before it
    return row + of * (each * -(-images // world)) - each * (of * images // world)


class _AllGatherUneven(torch.autograd.Function):
    """NCCL's and gloo's all-gather and reduce-scatter want as many rows of every rank. So those with one image fewer send zeros in its
    place: at most W images more on the way, no call more, and no other sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, images: int, each: int) -> Tensor:
        ctx.places, ctx.own, ctx.most = _places(images, each, world_size(), x.device), len(x), each * -(-images // world_size())
        filled = x.new_zeros((ctx.most, *x.shape[1:]))
        filled[: len(x)] = x
        out = x.new_empty((world_size() * ctx.most, *x.shape[1:]))
        began = _wait_begins(x)
        dist.all_gather_into_tensor(out, filled)
        _wait_ends(x, began)
        return out.index_select(0, ctx.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        filled = grad.new_zeros((world_size() * ctx.most, *grad.shape[1:])).index_copy_(0, ctx.places, grad)
        mine = grad.new_empty((ctx.most, *grad.shape[1:]))
        began = _wait_begins(grad)
        dist.reduce_scatter_tensor(mine, filled)
        _wait_ends(grad, began)
        return mine[: ctx.own], None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
        began = _wait_begins(x)
        dist.all_gather_into_tensor(out, x.contiguous())
        _wait_ends(x, began)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        mine = grad.new_empty((grad.shape[0] // world_size(), *grad.shape[1:]))
        began = _wait_begins(grad)
        dist.reduce_scatter_tensor(mine, grad.contiguous())
        _wait_ends(grad, began)
        return mine
