"""A page of a vision transformer and of MAE: maps of attention, what is painted, and that kNN is no score of MAE."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipelines.commands import evaluate, runs
from pipelines.commands.report import gather
from pipelines.evaluation import quick
from pipelines.html import charts, patches
from pipelines.html.page import headline, render
from pipelines.html.pictures import attention, painted
from pipelines.html.sheets import write_sheets
from pipelines.runs import sync
from pipelines.runs.directory import Run, load_run, open_run
from pipelines.runs.listing import line
from pipelines.runs.scores import Measured
from pipelines.runs.scores import write as write_scores
from pipelines.tracking.card import card
from pipelines.tracking.record import Record
from pipelines.train.classifiers import digest
from simclr import checkpoint
from simclr.config import Config, Encoder, Views
from simclr.encoder.directory import write_encoder
from simclr.family import DINO
from simclr.methods import mae
from simclr.networks.encoders import encoder_of
from simclr.networks.vit import VisionTransformer, class_attention, vit
from simclr.stages import FineTune
from simclr.views.ops import normalise
from simclr.views.preprocessing import Preprocessing
from tests.pipelines.html.test_page import NBSP, Page, a_run, noise
from tests.simclr.methods.test_mae import SMALL
from tests.support.s3 import Proxy

COMMAND = (
    "simclr finetune {} --encoder.pool mean --optim.name adamw --optim.base-lr 1e-3 --optim.scaling linear --optim.weight-decay 0.05 "
    "--optim.warmup-epochs 5 --optim.layer-decay 0.75"
)
UNSCORED = "eighbours in its features and linear probes are no score of MAE"
VIT = DINO(encoder=Encoder(vit="micro", patch_px=8), views=SMALL.views, train=SMALL.train, watch=SMALL.watch, d_out=64)


def shares(*shape: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(2).random(shape, dtype=np.float32)
    return drawn / (1.25 * drawn.sum((2, 3), keepdims=True))  # a fifth stays with the token


# ── Attention ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_maps_go_from_nothing_to_their_own_most() -> None:
    """Two heads over 1 × 2 patches of 4 px: one looks left alone, the other at both alike."""
    given = np.array([[[[0.5, 0.0]], [[0.25, 0.25]]]])
    found = patches.enlarged(patches.maps(given), 4, 8)
    assert found.shape == (1, 3, 4, 8, 3)
    little, most, third = (68, 1, 84), (253, 231, 37), found[0, 0, 0, 7]
    assert (found[0, 1, :, :4] == most).all() and (found[0, 1, :, 4:] == little).all() and (found[0, 2] == most).all()
    # Mean: 0.375 and 0.125, a third of the most, is two of viridis's six steps.
    assert (found[0, 0, :, :4] == most).all() and tuple(third) == (49, 104, 142)
    assert (patches.maps(np.zeros((1, 1, 1, 2))) == little).all()


def test_the_page_shows_a_map_of_every_head_beside_each_query() -> None:
    page = Page(render(a_run(attention=shares(4, 3, 2, 2), method="dino", config={"d_out": 8})))
    (listed,) = page.all("ol", "maps")
    assert "crisp" in str(listed["class"]) and [a["id"] for a in page.all("section")].count("attention") == 1
    alts = [str(a["alt"]) for a in page.all("img") if str(a.get("alt")).startswith("Attention")]
    assert alts == ["Attention, mean", "Attention, head 1", "Attention, head 2", "Attention, head 3"] * 4
    assert page.has("(the student), which the run publishes; the paper shows its moving average")
    assert page.has("gives 20.0 % of its attention to itself")
    other = Page(render(a_run(attention=shares(4, 3, 2, 2))))
    assert other.has("The network is the published encoder.") and not other.has("moving average")
    assert not Page(render(a_run(method="dino", config={"d_out": 8}))).all("ol", "maps")  # of a ResNet


def test_attention_is_that_of_the_pixels_that_evaluation_sees() -> None:
    net, images = vit(width=32, blocks=2, heads=4, patch_px=4, size_px=16), noise(3, 16, 16)
    seen = Preprocessing.of(Views(size_px=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2)))
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(seen.mean).view(3, 1, 1)) / torch.tensor(seen.std).view(3, 1, 1)
    expected = class_attention(net, x).detach().numpy()
    assert np.allclose(attention(net, seen, images), expected, atol=1e-6) and expected.shape == (3, 4, 4, 4)


# ── MAE ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_mae_paints_stands_in_the_hidden_patches_of_the_runs_mask() -> None:
    """By the mask of seed, first epoch and sample id, in pixels between black and white."""
    config = replace(SMALL, seed=4, views=replace(SMALL.views, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2)))
    net, images, ids = mae.build_network(config).eval(), noise(2, 32, 32), np.array([7, 3])
    found = painted(net, config, Preprocessing.of(config.views), images, ids)
    assert found.shape == (2, 3, 32, 32, 3) and found.dtype == np.uint8 and np.array_equal(found[:, 2], images)
    order = mae.orders(config, 0, ids)
    x = normalise(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, config.views)
    with torch.no_grad():
        whole = mae.completed(net({"views": x[None], "order": order[None]})["pred"][0], x, order, config)
    back = whole * torch.tensor(config.views.std).view(3, 1, 1) + torch.tensor(config.views.mean).view(3, 1, 1)
    assert np.abs(found[:, 1] / 255 - back.clamp(0, 1).permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-5
    for i in range(2):
        for place in range(16):
            at = np.s_[8 * (place // 4) : 8 * (place // 4) + 8, 8 * (place % 4) : 8 * (place % 4) + 8]
            hidden = place not in order[i, :4].tolist()
            assert (found[i, 0][at] == 128).all() if hidden else np.array_equal(found[i, 0][at], images[i][at])
            assert np.array_equal(found[i, 1][at], images[i][at]) != hidden


def a_mae(**changes: Any) -> Any:
    return a_run(method="mae", config=SMALL.flat(), painted=noise(3, 3, 8, 8), **changes)


def test_the_page_of_mae_shows_what_it_paints_and_says_whose_colours_these_are() -> None:
    page = Page(render(a_mae()))
    alts = [str(a.get("alt")) for a in page.all("img")]
    assert [f"Image {i}, {kind}" for i in (1, 2, 3) for kind in patches.PAINTED] == [
        a for a in alts if a.split(", ")[-1] in patches.PAINTED
    ][-9:]
    assert page.has("of which 75 % of the patches are hidden") and page.has("get mean and deviation of the original patch")
    assert not page.has("What it paints is not shown")
    plain = replace(a_mae(), config=SMALL.flat() | {"normalised": False})
    assert not Page(render(plain)).has("deviation of the original patch")
    without = Page(render(replace(a_mae(), painted=noise(0, 3, 8, 8))))
    assert "painted" not in [a["id"] for a in without.all("section")] and without.has("What it paints is not shown")
    assert not Page(render(a_run())).has("paints")


def test_knn_is_no_result_of_mae() -> None:
    """The headline is the loss and, where there is one, a fine-tuned accuracy; the table of kNN says what is a score."""
    data = a_mae(facts={"run": "runs/my mae"})
    assert headline(data) == (
        "Loss 4.000",
        "mean square error of hidden patches, in normalised pixels, after 100 steps; it began at 5.980, and grey patches give 1.",
    )
    tuned = headline(replace(data, finetuned=("tuned", 0.875)))[1].replace(NBSP, " ")
    assert tuned.endswith("grey patches give 1. Fine-tuned, its encoder reaches 87.5 % top-1 (tuned).")
    page = Page(render(data))
    assert page.has(UNSCORED) and page.has(COMMAND.format("'runs/my mae'")) and page.has("top-1 Weighted kNN on") is False
    assert " ".join(page.texts).count(UNSCORED) == 2  # below the table, and at the curve of kNN
    other = Page(render(a_run()))
    assert not other.has(UNSCORED) and headline(a_run())[0].startswith("kNN")


def test_mocos_loss_that_begins_low_is_explained() -> None:
    data = a_run(scores=[], method="moco", config={"queue": 1023, "train.batch_size": 8})
    assert headline(data)[1] == "after 100 steps; it began at 5.980, since the first queue is random; all keys alike give 6.931."


# ── Runs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def a_published(config: Config, patterns: Path, path: Path) -> Run:
    run = open_run(path, "small", config, patterns)
    run.save()
    write_encoder(encoder_of(config).state_dict(), config, run.encoder, {})
    return run


QUICK = quick.Settings(device="cpu", baselines=False, limit=40)


def test_evaluate_of_mae_paints_with_its_newest_checkpoint(patterns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, net = a_published(SMALL, patterns, tmp_path / "run"), mae.build_network(replace(SMALL, seed=9))
    quick.run(run.path, None, QUICK)
    said = capsys.readouterr().err
    assert "the page will not show what the network paints" in said and f"{UNSCORED}; fine-tuning is: {COMMAND.format(run.path)}" in said
    without = gather(run)
    assert not len(without.painted) and without.attention.shape == (8, 3, 4, 4)
    checkpoint.write(run.checkpoints, checkpoint.capture(3, SMALL.to_dict(), net, torch.optim.SGD(net.parameters(), 0.1)), 1)
    quick.run(run.path, None, QUICK)
    assert "will not show" not in capsys.readouterr().err
    found = gather(run)
    assert np.array_equal(found.painted[:, 2], found.neighbours.queries) and len(found.painted) == 8
    assert (found.painted[:, 1] != found.painted[:, 2]).any() and found.painted.std() > 0
    sheets = {path.stem for path in write_sheets(found, run.path / "evaluation")}
    assert sheets == {"views", "neighbours", "attention", "painted"}


def test_of_a_run_in_s3_the_newest_checkpoint_is_fetched(
    patterns: Path, tmp_path: Path, s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has none of it yet."""
    at = "s3://photos/runs/mae"
    home = sync.Home(at)
    run, net = a_published(SMALL, patterns, home.path), mae.build_network(replace(SMALL, seed=9))
    home.send()
    state = checkpoint.capture(3, SMALL.to_dict(), net, torch.optim.SGD(net.parameters(), 0.1))
    home.send_checkpoint(checkpoint.write(run.checkpoints, state, 1), 1)
    monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path / "another"))
    evaluate.evaluate(evaluate.Args(Path(at), baselines=False, limit=40, device="cpu"))
    assert sync.Home(at).path != home.path and len(gather(load_run(sync.Home(at).path)).painted) == 8


@pytest.mark.parametrize("kind", ["vit", "mean", "resnet"])
def test_the_class_tokens_attention_is_shown_where_the_features_are_that_tokens(kind: str, patterns: Path, tmp_path: Path) -> None:
    encoder = {"vit": VIT.encoder, "mean": replace(VIT.encoder, pool="mean"), "resnet": Encoder(depth=8, cifar_stem=True)}[kind]
    run = a_published(replace(VIT, encoder=encoder), patterns, tmp_path / "run")
    quick.run(run.path, None, QUICK)
    found = gather(run)
    assert found.attention.shape == ((8, 3, 4, 4) if kind == "vit" else (0, 0, 0, 0)) and not len(found.painted)
    assert bool(Page(render(found)).all("ol", "maps")) == (kind == "vit")
    if kind == "vit":
        net = encoder_of(VIT)
        assert isinstance(net, VisionTransformer)
        assert np.allclose(found.attention, attention(net, Preprocessing.of(VIT.views), found.neighbours.queries), atol=1e-6)


def test_the_best_fine_tuning_of_this_encoder_is_found(patterns: Path, tmp_path: Path) -> None:
    run = a_published(SMALL, patterns, tmp_path / "run")
    assert gather(run).finetuned is None
    own = FineTune(encoder=SMALL.encoder, views=SMALL.views, train=SMALL.train, encoder_sha256=digest(run.encoder))
    for name, config, top1 in (("a", own, 0.5), ("b", own, 0.75), ("c", replace(own, encoder_sha256="0" * 64), 0.9)):
        tuned = open_run(tmp_path / name, "finetune-small", config, patterns, stage="finetune")
        tuned.save()
        write_scores(tuned, [{"name": "finetune", "top1": top1}], Measured())
    open_run(tmp_path / "d", "finetune-small", own, patterns, stage="finetune").save()  # not scored yet
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "run.json").write_text("{")
    assert gather(run).finetuned == ("b", 0.75)
    shutil.rmtree(run.encoder)
    assert gather(run).finetuned is None


def test_lists_and_cards_say_that_knn_is_no_score_of_mae(patterns: Path, tmp_path: Path) -> None:
    lines = {}
    for name, config in (("mae", SMALL), ("dino", VIT)):
        run = open_run(tmp_path / name, name, config, patterns)
        run.save()
        lines[name] = line(name, (run.path / "run.json").read_text(), '{"step": 3, "eval/knn_top1": 0.5}\n', [])
        text = card(
            {**config.to_dict(), "published": {}, "preprocessing": asdict(Preprocessing.of(config.views))},
            1,
            "x",
            Record(scores={"knn_top1": 0.5}),
            "none",
        )
        assert (UNSCORED in text) == (name == "mae") == (COMMAND.format("DIR") in text)
    assert runs.table([[lines["mae"]], [lines["dino"]]]).splitlines()[-1].endswith(COMMAND.format("RUN"))
    assert UNSCORED not in runs.table([[lines["dino"]]]) and UNSCORED not in runs.table([[replace(lines["mae"], metric="", score=None)]])


# ── Curves ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("at", "line_at", "side"),
    [(0.5, 0.1, "above"), (0.5, 0.45, "below"), (0.5, 0.55, "above"), (0.13, 0.2, "above"), (0.13, 0.6, "below"), (0.05, 0.1, "below")],
)
def test_a_references_name_keeps_off_the_curve(at: float, line_at: float, side: str) -> None:
    """The curve ends `line_at` of the height below the top; where there is no room above, the name stays below."""
    assert charts._side(at, np.array([0.0, 500.0, 1000.0]), 1000 * np.array([0.9, line_at, line_at])) == side
