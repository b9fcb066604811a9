"""NT-Xent's tiles: in Triton's interpreter against the definition, compiled for GPUs that are not here, and on one where there is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.kernels import nt_xent_tiles as tiles
from simclr.kernels.nt_xent import streamed
from simclr.loss import nt_xent
from tests.conftest import Within
from tests.simclr.kernels.test_nt_xent import CASES, compared, definition, graded, unit
from tests.support import ahead
from tests.support.ahead import SHARED, compiled

# ── In the interpreter ─────────────────────────────────────────────────────────────────────────────────────────────

H100, ONE = tiles.Gpu(90, 132), tiles.Gpu(80, 1)  # ONE splits nothing
# With several ranks, and alone, where the keys are the queries: also τ below `FIXED_FROM`, and sizes that are no multiple of a tile.
IN_TILES = [*((*case, H100) for case in CASES), (20, 300, 4, 64, 0.2, ONE), (24, 72, 24, 32, 0.02, H100), (8, 8, 0, 16, 0.5, ONE)]
# 512 rows: the positives of a tile stand in tiles that have neither the rows themselves nor an edge.
ALONE = [(8, 16, 0.1, H100), (150, 32, 0.1, H100), (512, 16, 0.1, ONE), (24, 32, 0.02, H100)]


def in_tiles(queries: Tensor, keys: Tensor | None, offset: int, temperature: float, on: tiles.Gpu) -> list[Tensor]:
    """Value and gradients of three times the value, in float32, as `streamed` calls the kernels on a GPU `on`."""
    q, k = tiles.parts(queries), None if keys is None else tiles.parts(keys)
    losses, share = tiles.forward(q, q if k is None else k, offset, temperature, on)
    found = tiles.gradients(q, k, share, offset, temperature, torch.full((), 3.0, device=queries.device), torch.float32, on)
    return [losses.mean(), *(g for g in found if g is not None)]


def of_itself(rows: Tensor, temperature: float) -> list[Tensor]:
    """The definition where keys are the queries, and the whole gradient."""
    value, d_queries, d_keys = graded(definition, rows.double(), rows.double(), 0, temperature)
    return [value, d_queries + d_keys]


def near(rows: int, d: int, apart: float) -> Tensor:
    """(rows, d) unit rows whose positives are near. If they are very near, p is almost 1, and the gradient a small difference."""
    first, noise = torch.randn(2, rows // 2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return F.normalize(torch.cat([first, first + apart * noise]), dim=1)


def opposite(rows: int, d: int) -> Tensor:
    """(rows, d) one row, and all others opposite to it; as long as rounding may make them: 1 + 2^-9."""
    row = unit(1, d)
    return torch.cat([row, -row.expand(rows - 1, d)]) * (1 + 2**-9)


def interpreted() -> list[tuple[str, float, float]]:
    """Differences of Triton's kernels, run in Python on CPU tensors, from the definition: (name, difference, bound)."""
    found: list[tuple[str, float, float]] = []
    # The interpreter multiplies the bits of bfloat16. float16, which takes the same way through the kernels, replaces it here.
    for dtype, exact, low in ((torch.float32, 1e-6, 5e-6), (torch.float16, 5e-4, 5e-4)):  # low: with τ = 0.02, logits reach 50
        for rows, columns, offset, d, temperature, on in IN_TILES:
            keys = unit(columns, d).to(dtype)
            queries = keys[offset : offset + rows].contiguous()
            theirs = graded(definition, queries.double(), keys.double(), offset, temperature)
            bound = exact if temperature > 0.03 else low
            name = f"{dtype}, {rows} rows, {columns} keys"
            compared(lambda *one: found.append(one), name, in_tiles(queries, keys, offset, temperature, on), theirs, bound)
        alone = [(unit(rows, d), temperature, on, exact if temperature > 0.05 else low) for rows, d, temperature, on in ALONE]
        # In plain float32 the gradient of the last is 2e-5 off.
        for one, temperature, on, bound in [*alone, (near(20, 16, 0.02), 0.1, H100, 10 * exact)]:
            rows = one.to(dtype)
            ours, theirs = in_tiles(rows, None, 0, temperature, on), of_itself(rows, temperature)
            compared(lambda *x: found.append(x), f"{dtype}, {len(rows)} rows alone, τ = {temperature}", ours, theirs, bound)
        for temperature in (tiles.FIXED_FROM, 0.01):  # the first row's sum is exp(−83) or exp(−200) of the others'
            rows = opposite(20, 16).to(dtype)
            ours, theirs = in_tiles(rows, None, 0, temperature, ONE), of_itself(rows, temperature)
            for part, a, b, unit_of in zip(("value", "gradient"), ours, theirs, (1.0, 3 / (len(rows) * temperature)), strict=True):
                off = float((a - b).abs().max()) / unit_of  # the gradient is a small difference here: of the weights, which are near 1
                found.append((f"{dtype}, opposite rows, τ = {temperature}, {part}", off, 2 * exact if dtype == torch.float16 else 2e-5))
    return found


def test_tiles_equal_the_definition(within: Within) -> None:
    found = ahead.interpreted(__name__)
    assert len(found) == 2 * (3 * len(IN_TILES) + 2 * (len(ALONE) + 1 + 2))
    for what, deviation, bound in found:
        within(what, deviation, bound)


def test_the_way_over_the_keys_is_split_where_rows_are_few() -> None:
    """Programs fill an H100 at W = 1,024, where a rank has 128 of 131,072 rows, and at N = 4,096 on one; large batches need no splits."""
    found = {}
    for rows, columns in ((128, 131_072), (8_192, 8_192), (65_536, 65_536), (262_144, 262_144), (2, 2)):
        queries, keys = (torch.empty(n, 128, dtype=torch.bfloat16, device="meta") for n in (rows, columns))
        for kernel in ("sums", "weighted"):
            found[rows, kernel] = tiles._grid(rows, columns, tiles._tile(kernel, queries, keys, H100), H100)
    assert found[128, "sums"][1] >= 200 and found[128, "weighted"] == (2, 128)
    assert found[8_192, "sums"] == (64, 4) and found[8_192, "weighted"] == (128, 2)
    assert found[65_536, "weighted"] == (1_024, 1) and found[262_144, "weighted"] == (4_096, 1) and found[2, "sums"] == (1, 1)
    for count in range(1, 2_000):
        splits = tiles._splits(count, count, 132)
        assert count * splits <= max(8 * 132, count) and splits <= count


# ── Compiled ahead ─────────────────────────────────────────────────────────────────────────────────────────────────


def checked(kernel: str, dtype: torch.dtype, d: int, capability: int, fixed: bool = True, by: tuple[bool, bool] = (True, True)) -> None:
    """The assembler's report for a kernel with the settings of a launch over many rows: no spills; tiles fit and use tensor cores."""
    from simclr.kernels import nt_xent_triton

    rows = tiles.parts(torch.empty(256, d, dtype=dtype))
    tiled = kernel in ("sums", "weighted")
    settings = tiles._common(rows, fixed)
    settings |= tiles._tile(kernel, rows, rows, tiles.Gpu(capability, 132)) if tiled else {"ROWS": tiles._ENTRIES // settings["WIDE"]}
    if kernel in ("weighted", "gradient"):
        settings |= {"BY_OUTER": by[0], "BY_INNER": by[1]}
    name = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    kinds = dict.fromkeys(("outer", "inner", "queries", "keys"), name[rows.dtype]) | {"out": name.get(dtype, "*fp32")}
    kinds |= dict.fromkeys(("sums", "share", "losses", "weighted", "grad"), "*fp32")
    kinds |= dict.fromkeys(("slope", "shift", "unlifted", "scale"), "fp32")
    function = getattr(nt_xent_triton, f"{kernel}_kernel")
    arguments = {n: settings.get(n, kinds.get(n, "i32")) for n in function.arg_names}
    report = compiled(function, arguments, capability, settings.get("num_warps", 4), settings.get("num_stages", 2))
    what = report.line(f"{kernel} {dtype} d = {d} sm_{capability}")
    print(what)
    assert report.spilled == 0, what
    if tiled:
        assert report.shared <= (99 * 1024 if capability == 80 else SHARED[capability]), what
        # On Hopper and Blackwell tiles are multiplied by groups of warps, where they have 64 rows: only wide float32 has fewer.
        by_warp = capability == 80 or (dtype == torch.float32 and d > 128 and kernel == "weighted")
        multiplies = "HMMA" if by_warp else {90: "HGMMA", 100: "UTCHMMA"}[capability]
        assert any(name.startswith(multiplies) for name in report.instructions), what


@pytest.mark.parametrize("kernel", ["sums", "weighted"])
@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.bfloat16, 80), (torch.bfloat16, 90), (torch.bfloat16, 100), (torch.float32, 90)], ids=str
)
def test_tiles_compile_without_spills(kernel: str, dtype: torch.dtype, capability: int) -> None:
    """At the papers' d = 128. The other shapes: `make test-compile`."""
    pytest.importorskip("triton")
    checked(kernel, dtype, 128, capability)


@pytest.mark.compile
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [32, 64, 128, 256, 512])
def test_all_tiles_compile_without_spills(dtype: torch.dtype, d: int, capability: int) -> None:
    """Every setting of the tables; at d = 128 also for several ranks and for τ below `FIXED_FROM`."""
    pytest.importorskip("triton")
    if d > tiles._WIDEST[dtype]:
        pytest.skip("rows so wide go block by block")
    for kernel in ("sums", "losses", "weighted", "gradient"):
        checked(kernel, dtype, d, capability)
    if d == 128:
        checked("sums", dtype, d, capability, fixed=False)
        for by in ((True, False), (False, True), (True, True)):
            checked("weighted", dtype, d, capability, fixed=False, by=by)
            checked("weighted", dtype, d, capability, by=by)


# ── On a GPU ───────────────────────────────────────────────────────────────────────────────────────────────────────

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BOUNDS = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)]


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS, ids=str)
def test_tiles_on_the_device_equal_the_definition(within: Within, dtype: torch.dtype, bound: float) -> None:
    """A cosine of float32 rows may be 3 · 2^-22 off (`nt_xent_tiles`), and a logit 1 / τ times that."""
    wide = [(512, 1536, 512, d, 0.1) for d in (32, 64, 100, 256)]
    for rows, columns, offset, d, temperature in [*CASES, *wide, (2048, 4096, 2048, 128, 0.1), (128, 8192, 256, 128, 0.1)]:
        keys = unit(columns, d).to(dtype)
        queries = keys[offset : offset + rows].contiguous()
        theirs = graded(definition, queries.double(), keys.double(), offset, temperature)
        ours = graded(streamed, queries.cuda(), keys.cuda(), offset, temperature)
        compared(within, f"{dtype}, d = {d}", [t.cpu() for t in ours], theirs, bound)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS, ids=str)
@pytest.mark.parametrize("temperature", [0.1, tiles.FIXED_FROM, 0.02])
def test_one_ranks_tiles_on_the_device_equal_the_definition(within: Within, dtype: torch.dtype, bound: float, temperature: float) -> None:
    """One gradient kernel; views near each other, as in training, and not. Twice the same bits."""
    for name, rows in {"far": unit(1000, 128), "near": near(1000, 128, 0.5), "opposite": opposite(200, 64), "few": unit(6, 64)}.items():
        z = rows.to(dtype).cuda().requires_grad_()
        found = []
        for _ in range(2):
            value = streamed(z, z, 0, temperature)
            found.append((value.detach(), torch.autograd.grad(3 * value, z)[0]))
        theirs = of_itself(rows.to(dtype), temperature)
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]), "two calls give two results"
        value_off = float((found[0][0].double().cpu() - theirs[0]).abs() / theirs[0].abs().clamp(min=1))
        # Of the largest entry of the gradient, or of the weights that it is a difference of, if these cancel.
        scale = max(float(theirs[1].abs().max()), 3 / (len(rows) * temperature) / rows.shape[1] ** 0.5)
        gradient_off = float((found[0][1].double().cpu() - theirs[1]).abs().max()) / scale
        wider = 1 if temperature == 0.1 else 0.1 / temperature  # a logit is 1 / τ times a cosine
        within(f"{dtype}, {name}, τ = {temperature}, value", value_off, bound * wider)
        within(f"{dtype}, {name}, τ = {temperature}, gradient", gradient_off, bound * wider)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS[:2], ids=str)
def test_large_batches_on_the_device(within: Within, dtype: torch.dtype, bound: float) -> None:
    """N = 32,768 in at most 1 GiB, against float64 in blocks of rows, twice the same bits; and N = 131,072 runs."""
    generator = torch.Generator("cuda").manual_seed(0)
    first, noise = torch.randn(2, 32_768, 128, device="cuda", generator=generator)
    z = torch.cat([first, first + 0.5 * noise]).to(dtype).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    value = nt_xent(z, 0.1)
    (gradient,) = torch.autograd.grad(value, z)
    added = torch.cuda.max_memory_allocated() - held
    assert added <= 1 << 30, f"{added / 2**20:,.0f} MiB"
    (again,) = torch.autograd.grad(nt_xent(z, 0.1), z)
    assert torch.equal(gradient, again)
    rows = F.normalize(z.detach().float(), dim=1).to(dtype)
    exact = rows.double().requires_grad_()
    theirs = streamed(exact, exact, 0, 0.1)
    ours = streamed(rows.requires_grad_(), rows, 0, 0.1)
    wanted, found = torch.autograd.grad(theirs, exact)[0], torch.autograd.grad(ours, rows)[0]
    within(f"{dtype}, value", float((ours.double() - theirs).abs() / theirs), bound)
    within(f"{dtype}, gradient", float((found.double() - wanted).abs().max() / wanted.abs().max()), bound)
    many = torch.randn(262_144, 128, device="cuda", generator=generator).to(dtype).requires_grad_()
    assert torch.autograd.grad(nt_xent(many, 0.1), many)[0].isfinite().all()
