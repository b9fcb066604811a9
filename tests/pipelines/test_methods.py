"""SimCLR's siblings through the commands: recipes, flags, files, cards, pages, sweeps and benches say whose they are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import cli
from pipelines.bench import methods as table
from pipelines.bench.step import step
from pipelines.commands import pretrain, recipes, report
from pipelines.html import curves
from pipelines.runs import config_file
from pipelines.runs.directory import load_run, open_run
from pipelines.tracking.card import card
from pipelines.tracking.record import Record
from simclr import papers
from simclr.config import Config, Encoder, Optim, Train
from simclr.errors import UserError
from simclr.family import BYOL, DINO, MAE, METHODS, MoCo, MoCoV3, SwAV
from simclr.footprint import footprint
from simclr.methods.choice import shapes
from simclr.recipes import RECIPES, changed_from
from simclr.stages import FineTune
from tests.support.command import Run, refused
from tests.support.small import TINY
from tune import resolve, spaces

SHARED: dict[str, Any] = {"encoder": TINY.encoder, "views": TINY.views, "optim": TINY.optim, "watch": TINY.watch}
SHARED |= {"train": Train(batch_size=24, steps=2, report_every_steps=1)}
MOCO = MoCo(**SHARED, queue=96, ema=0.9, d_out=16)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe `small_moco`."""

    def small_moco() -> MoCo:
        """A small one."""
        return MOCO

    monkeypatch.setitem(RECIPES, "small_moco", small_moco)


def test_every_method_has_a_name_and_papers() -> None:
    assert list(papers.NAMED) == list(METHODS)
    assert papers.named("moco").cited == "arXiv:1911.05722, 2003.04297" and papers.named("newer").title == "newer"


def test_recipes_are_grouped_by_method(simclr: Run, known: None) -> None:
    _, out, _ = simclr("recipes")
    lines = out.splitlines()
    assert lines[0] == "SimCLR, arXiv:2002.05709, 2006.10029" and lines[1].startswith("  patterns_tiny ")
    heading = lines.index("MoCo, arXiv:1911.05722, 2003.04297")
    below = lines[heading + 1 : lines.index("", heading)]
    assert any(line.split() == ["small_moco", "A", "small", "one."] for line in below)


@pytest.mark.parametrize(
    "config",
    [MOCO, MoCoV3(**SHARED, hidden=32), BYOL(**SHARED, hidden=32), SwAV(**SHARED), DINO(**SHARED)],
    ids=lambda config: config.METHOD,
)
def test_a_whole_file_of_each_method_is_read_back_without_a_recipe(tmp_path: Path, config: Config) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(config_file.written(config, "", {"method": config.METHOD}))
    assert config_file.read(file) == config_file.Named("mine", config)


def test_files_of_other_methods_are_told_apart(tmp_path: Path, known: None, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    recipes.main(recipes.Args("small_moco"))
    file.write_text(text := capsys.readouterr().out)
    assert config_file.read(file) == config_file.Named("small_moco", MOCO)
    for changed, sentence in {
        text.replace("method: moco", "method: mocco"): "unknown method 'mocco'; nearest: moco",
        text.replace("method: moco", "method: byol"): "method is byol, and the recipe small_moco is of moco",
        "recipe: patterns_tiny\nqueue: 96\n": "line 2: queue is a field of moco and swav; simclr has .*; a line method: NAME asks for",
        "method: moco\nqueue: 96\n": "leaves out d_out and .* more, and names no recipe",
    }.items():
        file.write_text(changed)
        with pytest.raises(UserError, match=sentence):
            config_file.read(file)


def test_a_flag_of_another_method_names_the_right_one(simclr: Run, known: None) -> None:
    refused(
        simclr("pretrain", "small_moco", "--data", "x", "--loss.temperature", "0.1"),
        "loss.temperature is a field of simclr; moco has temperature; `simclr pretrain small_moco --help`",
    )
    refused(
        simclr("pretrain", "patterns_byol", "--data", "x", "--temperature", "0.2"),
        "temperature is a field of moco, mocov3, swav, dino and clip; byol has ema, hidden, d_out, predictor",
    )
    refused(simclr("pretrain", "patterns_tiny", "--data", "x", "--queue=96"), "queue is a field of moco and swav; simclr has head.layers")
    parsed = cli.parse("pretrain", pretrain.Args, ["small_moco", "--data", "x", "--queue", "48", "--ema", "0.5"])
    assert parsed.config == replace(MOCO, queue=48, ema=0.5)
    _, out, _ = simclr("pretrain", "small_moco", "--help")
    assert "  --queue                  K, keys of earlier batches (96)" in out and "--loss.temperature" not in out


def test_a_changed_recipe_tells_its_own_methods_fields(known: None) -> None:
    assert changed_from("small_moco", replace(MOCO, queue=48, seed=3)) == "small_moco, queue 48"
    assert changed_from("small_moco", MOCO) == changed_from("small_moco", replace(MOCO, watch=replace(MOCO.watch, k=3))) == "small_moco"
    assert changed_from("finetune-small_moco", TINY) == "finetune-small_moco"
    mae = RECIPES["patterns_mae"]()
    tuned = FineTune(encoder=mae.encoder.trained, views=mae.views, tap=0)
    assert mae.encoder.trained != mae.encoder and changed_from("finetune-patterns_mae", tuned) == "finetune-patterns_mae"


def test_the_page_of_a_later_stage_is_not_said_to_be_simclrs(tmp_path: Path, patterns: Path) -> None:
    tuned = FineTune(encoder=TINY.encoder, head=TINY.head, views=TINY.views, train=TINY.train, tap=0)
    open_run(tmp_path / "run", "finetune-small_moco", tuned, patterns, stage="finetune").save()
    assert report.gather(load_run(tmp_path / "run")).title == "Fine-tuning · finetune-small_moco"


def test_a_directory_of_another_methods_run_is_refused(tmp_path: Path, patterns: Path) -> None:
    open_run(tmp_path / "run", "small", TINY, patterns).save()
    with pytest.raises(UserError, match="belongs to another config: method simclr there, moco here"):
        open_run(tmp_path / "run", "small", replace(MOCO, train=TINY.train), patterns)


def test_a_card_names_the_method_and_has_no_head_that_is_not_there() -> None:
    about = {"published": {"recipe": "small_moco", "step": 2, "data": "d"}}
    views = {"size_px": 32, "centre_crop": 1.0, "mean": (0, 0, 0), "std": (1, 1, 1), "resize": "bicubic"}
    text = card({**MOCO.to_dict(), **about, "preprocessing": views}, 1000, "name", Record(), "none")
    assert "trained by MoCo" in text and "arXiv:1911.05722" in text and "2002.05709" not in text and "rojection head" not in text
    assert "| Recipe | `small_moco`: N = 24, LARS, τ = 0.2, K = 96, a moving average that keeps 0.9;" in text
    theirs = card({**TINY.to_dict(), **about, "preprocessing": views}, 1000, "name", Record(), "none")
    student = {**TINY.to_dict(), "published": {**about["published"], "teacher_pretrained": "moco"}, "preprocessing": views}
    assert "that learned from a classifier, whose own encoder was pretrained by MoCo" in card(student, 1000, "name", Record(), "none")
    assert "of the SimCLR family" in theirs and "| Projection head | 2 layers, z has 16 numbers |" in theirs and "τ = 0.2" in theirs
    assert "arxiv.org/abs/2002.05709" in theirs and "arxiv.org/abs/2006.10029" in theirs and "| Method |" not in theirs
    assert "that point the same way" in text and "It was taught that a picture stays the same" in text
    swav = card(
        {**SwAV(**(SHARED | {"optim": Optim(name="adamw")}), prototypes=30).to_dict(), **about, "preprocessing": views},
        1000,
        "name",
        Record(),
        "none",
    )
    assert "AdamW, τ = 0.1, K = 30;" in swav and "K = 0" not in swav


def test_a_card_of_mae_does_not_promise_what_neighbours_say() -> None:
    """Its views are crops that it completes: nothing taught it that two views are the same, or one of other colours."""
    about = {"published": {"recipe": "mae", "step": 2, "data": "d"}}
    views = {"size_px": 32, "centre_crop": 1.0, "mean": (0, 0, 0), "std": (1, 1, 1), "resize": "bicubic"}
    config = MAE(**(SHARED | {"encoder": Encoder(vit="micro", patch_px=8)}))
    text = card({**config.to_dict(), **about, "preprocessing": views}, 1000, "name", Record(), "none")
    assert "its worth shows when it is fine-tuned" in text and "point the same way" not in text
    assert "stays the same" not in text and "colour" not in text and "It knows what its training pictures show" in text


def test_the_usual_flags_are_of_the_method(simclr: Run) -> None:
    assert pretrain.Args.usual(MOCO)["--temperature"] == "tau of InfoNCE"
    swav = pretrain.Args.usual(SwAV(**SHARED))
    assert "InfoNCE" not in swav["--temperature"] and "keys" not in swav["--queue"] and "--prototypes" in swav
    assert "InfoNCE" not in pretrain.Args.usual(DINO(**SHARED))["--temperature"]


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_a_pages_chance_level_is_the_methods(kind: type[Config]) -> None:
    transformer = {"encoder": Encoder(vit="micro", patch_px=8)} if kind is MAE else {}
    config = kind(**(SHARED | transformer), **({"queue": 96, "symmetric": True} if kind is MoCo else {}))
    said = curves.words(config.METHOD or "simclr", config.flat()).chance
    assert said is not None and said[0] == pytest.approx(shapes(config).chance)
    text = str(curves.words(config.METHOD or "simclr", config.flat()))
    assert ("NT-Xent" in text) == (config.METHOD == "") and ("queue" in text) == (config.METHOD == "moco")


def test_a_sweep_over_another_methods_fields_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"space smoke does not go with the recipe: loss.temperature is a field of simclr; moco has temperature"
    ):
        resolve.restricted(spaces.space("smoke"), MOCO, {})
    with pytest.raises(UserError, match=r"head.layers is a field of simclr; moco has layers"):
        resolve.value_of(MOCO, "head.layers")
    assert resolve.changed(MOCO, {"ema": 0.99, "temperature": 0.1}) == replace(MOCO, ema=0.99, temperature=0.1)
    vit = replace(TINY, encoder=replace(TINY.encoder, vit="micro", patch_px=8))
    with pytest.raises(UserError, match=r"encoder.depth is a ResNet's, and its encoder is micro"):
        resolve.restricted(spaces.space("width-depth"), vit, {})


def test_bench_step_has_simclr_beside_another_method(capfd: pytest.CaptureFixture[str]) -> None:
    rows = list(step(replace(MOCO, views=replace(MOCO.views, size_px=8)), 6, 1, 1, torch.device("cpu"), None))
    assert [row["name"] for row in rows] == ["moco", "simclr", "cost"]
    out = capfd.readouterr().out
    assert "step of MoCo on views of 8 px, ResNet-8" in out and f"a step of moco takes {1 / rows[1]['ratio']:.3f} ×" in out
    assert 1 / rows[1]["ratio"] == pytest.approx(rows[1]["median"] / rows[0]["median"])


def test_a_moving_average_and_a_queue_count_as_weights() -> None:
    method = shapes(MOCO)
    there = [*method.network.parameters(), *method.network.buffers(), *method.state.parameters(), *method.state.buffers()]
    assert footprint(MOCO).weights == sum(x.numel() * x.element_size() for x in there)
    trained = sum(x.numel() for x in [*method.network.parameters(), *method.network.buffers()])
    assert sum(x.numel() for x in there) == 2 * trained + 96 * 16


def test_bench_methods_trains_a_complete_run_once(
    tmp_path: Path, patterns: Path, known: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RECIPES, "small", lambda: replace(TINY, train=SHARED["train"]))
    asked: tuple[Any, ...] = (("small", "small_moco"), 1, None, patterns, tmp_path / "runs", 1, torch.device("cpu"))
    first = list(table.methods(*asked))
    text = capsys.readouterr().out
    assert [row["method"] for row in first] == ["simclr", "moco"] and all(0 <= row["knn_top1"] <= 1 for row in first)
    assert text.splitlines()[0].startswith("| method | recipe |") and "| MoCo | `small_moco` |" in text
    assert math.isfinite(first[1]["loss"]) and all(0 < row["memory_mib"] < 1000 for row in first)  # libraries, which are more, left out
    monkeypatch.setattr(table, "train", lambda *_: pytest.fail("it was trained again"))
    assert list(table.methods(*asked)) == first and capsys.readouterr().out == text
    monkeypatch.setattr(table, "_tuning", lambda config: table._ADAMW)
    with pytest.raises(UserError, match="small-0 was fine-tuned with other settings than today's; remove"):
        list(table.methods(*asked))
    monkeypatch.setitem(RECIPES, "small", lambda: replace(TINY, train=replace(SHARED["train"], steps=3)))
    with pytest.raises(UserError, match=r"small_moco and small differ in epochs, and .*; --like RECIPE gives"):
        list(table.methods(*asked))
    like = replace(TINY, encoder=replace(TINY.encoder, width=16), train=replace(SHARED["train"], batch_size=48, steps=1))
    monkeypatch.setattr(table, "_row", lambda name, config, *_: {"name": name, "config": config})
    monkeypatch.setattr(table, "table", lambda rows: [])
    alike = [row["config"] for row in table.methods(*asked, like=like)]
    assert [(c.encoder, c.train.batch_size, c.train.steps) for c in alike] == 2 * [(like.encoder, 48, 1)]
    vit = table._like(RECIPES["patterns_mae"](), RECIPES["imagenet_dino_vit_small"]()).encoder  # but for drop path, which MAE refuses
    assert vit == replace(RECIPES["imagenet_dino_vit_small"]().encoder, drop_path=0.0)
    monkeypatch.undo()
    monkeypatch.setitem(RECIPES, "small", lambda: replace(TINY, train=replace(SHARED["train"], steps=3)))
    with pytest.raises(UserError, match="is a run of another config of small; remove"):
        list(table.methods(("small",), *asked[1:]))
