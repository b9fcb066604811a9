"""Settings that are each valid and together senseless: refused, or mended and said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands import distill, finetune, pretrain
from pipelines.runs.directory import Run, load_run, open_run
from pipelines.train import classifiers, driver, ray_train
from simclr import sense
from simclr.config import Config, Encoder, Loss, Optim, SimCLR, Train, Views, Watch
from simclr.data.manifest import Manifest, Shard, read_manifest
from simclr.errors import UserError
from simclr.family import DINO, MAE, MoCo, SwAV
from simclr.methods.method import schedule
from simclr.optim import lr_peak
from simclr.recipes import recipe
from simclr.stages import Distill, FineTune
from tests.support.command import Run as Command
from tests.support.command import refused
from tests.support.sweeps import a_sweep
from tune import validate

IMAGENET = 1_281_167

SMALL = Encoder(cifar_stem=True)


def shards(train: int, height: tuple[int, int], width: tuple[int, int], classes: int = 10) -> Manifest:
    splits = {name: (Shard(f"{name}.beton", 1, "", n),) for name, n in (("train", train), ("test", 50))}
    names = tuple(map(str, range(classes)))
    moments: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "source": "", "options": {}, "skipped": 0, "versions": {}}
    return Manifest(splits=splits, classes=names, kind="jpeg", height_px=height, width_px=width, **moments)


PHOTOS = shards(IMAGENET, (20, 500), (20, 500))


def notes(config: Config, manifest: Manifest = PHOTOS, *workers: int) -> tuple[str, ...]:
    return sense.notes(config, manifest, manifest.examples("train"), workers or (1,))


# ── Warm-up ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", [Config, FineTune, Distill])
def test_a_warm_up_that_does_not_fit_lasts_a_tenth_of_the_run_and_is_said(stage: type[Config]) -> None:
    """`imagenet_resnet50 --train.epochs 5`: 10 epochs of warm-up are 3,127 of 1,564 steps, and the rate would rise to the end."""
    base = recipe("imagenet_resnet50")
    config = stage(optim=base.optim, train=replace(base.train, epochs=5))
    assert config.warmup_steps(IMAGENET) == 156
    said = "the warm-up lasts 156 of 1,564 steps, a tenth of this short run, and not the 3,127 steps of 10 epochs"
    assert notes(config) == (said,)
    rate, peak = schedule(config, IMAGENET), lr_peak(0.3, 4096, "linear")
    rates = [rate(step) for step in range(1564)]
    assert rates[156] == max(rates) == peak and rates[-1] < 1e-4 * peak


@pytest.mark.parametrize(("warmup", "epochs", "steps", "expected"), [(9.9, 10, None, 3096), (10, 10, None, 312), (10, 100, 1000, 100)])
def test_only_a_warm_up_that_leaves_nothing_is_cut(warmup: float, epochs: float, steps: int | None, expected: int) -> None:
    config = SimCLR(optim=Optim(warmup_epochs=warmup), train=Train(epochs=epochs, steps=steps))
    assert config.warmup_steps(IMAGENET) == expected
    (said,) = notes(config)
    assert ("a tenth of this short run" in said) == (expected != 3096)


@pytest.mark.parametrize("stage", [Config, FineTune, Distill])
def test_a_warm_up_of_more_than_half_of_the_run_is_said_and_stays(stage: type[Config]) -> None:
    base = recipe("imagenet_resnet50")
    config = stage(optim=base.optim, train=replace(base.train, epochs=11))
    assert config.warmup_steps(IMAGENET) == config.warmup_asked(IMAGENET) == 3127
    assert notes(config) == (
        "the warm-up lasts 3,127 of 3,441 steps, 91 % of the run; a smaller --optim.warmup-epochs leaves time to decay",
    )
    assert notes(replace(config, train=replace(base.train, epochs=20))) == ()  # 3,127 of 6,256
    assert len(notes(replace(config, train=replace(base.train, epochs=19.9)))) == 1
    rate = schedule(config, IMAGENET)
    assert max(range(3441), key=rate) == 3127


@pytest.mark.parametrize("name", ["imagenet_resnet50", "imagenet_resnet152_3x_sk"])
def test_a_recipe_on_its_data_has_nothing_to_say(name: str) -> None:
    assert notes(recipe(name)) == ()


# ── Said ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "manifest", "said"),
    [
        (
            SimCLR(train=Train(batch_size=60), views=Views(size_px=32), encoder=SMALL),
            shards(150, (32, 32), (32, 32)),
            "online kNN: all 150 images of its bank vote, since watch.k is 200; a smaller --watch.k tells more",
        ),
        (SimCLR(watch=Watch(bank=100)), PHOTOS, "online kNN: all 100 images of its bank vote, since watch.k is 200; a smaller"),
        (
            SimCLR(train=Train(batch_size=60)),
            shards(500, (32, 96), (32, 72)),
            "every image is enlarged: views are 224 px, and the largest image in the shards is 96 × 72 px",
        ),
        (
            SimCLR(views=Views(size_px=19, blur_p=(0.0, 0.1)), encoder=SMALL),
            PHOTOS,
            "views of 19 px are not blurred, though they should be",
        ),
        (
            SimCLR(views=Views(size_px=19), encoder=SMALL),
            PHOTOS,
            "views of 19 px are not blurred, though they should be: the kernel, a tenth of the side",
        ),
        (SimCLR(views=Views(size_px=32)), PHOTOS, "views of 32 px leave ResNet-50 a last map of 1 × 1, since its stem is for large images"),
    ],
)
def test_what_has_no_effect_is_said(config: Config, manifest: Manifest, said: str) -> None:
    (found,) = notes(config, manifest)
    assert found.startswith(said)


def test_maes_crops_are_flipped_and_no_more_so_a_missing_blur_is_not_said() -> None:
    config = MAE(encoder=Encoder(vit="micro", patch_px=4), views=Views(size_px=16))
    assert not [note for note in notes(config, PHOTOS) if "blurred" in note]


def test_tuning_a_vision_transformer_with_lars_is_said_with_the_flags_that_it_wants() -> None:
    encoder = Encoder(vit="micro", patch_px=4)
    (said,) = notes(FineTune(encoder=encoder, views=Views(size_px=32), tap=0))
    optim = Optim(name="adamw", base_lr=1e-3, weight_decay=0.05, layer_decay=0.75, warmup_epochs=5)
    flags = {f"--optim.{name.replace('_', '-')} {getattr(optim, name):g}" for name in ("weight_decay", "layer_decay", "warmup_epochs")}
    assert "--optim.name adamw" in said and "--optim.scaling linear" in said and all(flag in said for flag in flags)
    assert notes(FineTune(encoder=encoder, views=Views(size_px=32), tap=0, optim=optim)) == ()
    assert notes(FineTune(encoder=encoder, views=Views(size_px=32), tap=0, linear=True)) == ()
    (student,) = notes(Distill(encoder=encoder, views=Views(size_px=32)))
    assert "--optim.base-lr 2.5e-4" in student and "layer-decay" not in student


def test_one_epoch_is_not_epochs() -> None:
    config = SimCLR(optim=Optim(warmup_epochs=1), train=Train(epochs=1))
    assert notes(config)[0].endswith(" steps of 1 epoch")


@pytest.mark.parametrize(
    ("config", "workers", "images"),
    [
        (SimCLR(train=Train(batch_size=64, micro_batch=1)), (2, 4), 2),
        (SimCLR(train=Train(batch_size=64, micro_batch=4)), (2,), 8),
        (SimCLR(train=Train(batch_size=64), encoder=Encoder(batchnorm="per_worker")), (4, 8), 8),
        (FineTune(train=Train(batch_size=64), encoder=Encoder(batchnorm="per_worker")), (8,), 8),
    ],
)
def test_statistics_of_few_images_are_said(config: Config, workers: tuple[int, ...], images: int) -> None:
    found, *_ = notes(config, PHOTOS, *workers)
    assert found == f"BatchNorm normalises over {images} images at a time and trains worse than over 16 or more"
    assert notes(replace(config, train=replace(config.train, micro_batch=None, batch_size=128)), PHOTOS, 2) == ()


def test_what_waits_for_longer_than_the_run_is_said() -> None:
    train = Train(batch_size=50, steps=20)  # 20 steps an epoch
    waiting = SwAV(train=train, frozen_steps=20, queue=500, queue_epochs=0.5)

    def said(config: Config) -> list[str]:
        return [note for note in sense.notes(config, PHOTOS, 1000) if "never" in note]

    assert said(waiting) == [
        "the prototypes never learn: they wait for 20 of 20 steps; give a smaller --frozen-steps",
        "the queue is never used: it is full after 20 of 20 steps; give a smaller --queue-epochs or --queue",
    ]
    assert said(replace(waiting, frozen_steps=19, queue=450)) == []
    assert said(DINO(train=train)) == ["the head's last layer never learns: it waits for 20 of 20 steps; give a smaller --frozen-epochs"]
    assert said(DINO(train=train, frozen_epochs=0.5)) == []


def test_transformers_without_batchnorm_are_told_nothing_of_it() -> None:
    vit = Encoder(vit="micro", patch_px=16)
    assert not sense.normalises(MAE(encoder=vit)) and not sense.normalises(DINO(encoder=vit))
    assert sense.normalises(DINO(encoder=vit, head_norm=True)) and sense.normalises(SwAV(encoder=vit)) and sense.normalises(DINO())
    single = MAE(encoder=vit, train=Train(batch_size=60, micro_batch=1))
    assert not [note for note in notes(single) if "BatchNorm" in note]


def test_what_does_not_apply_is_not_said() -> None:
    small = shards(150, (32, 32), (32, 32), classes=0)
    config = SimCLR(train=Train(batch_size=60), views=Views(size_px=20), encoder=SMALL)
    assert notes(config, small) == ()  # without labels there is no kNN, and 20 px are blurred
    blind = replace(config, views=Views(size_px=19, blur_p=(0, 0)), watch=Watch(k=150))
    assert notes(blind, replace(small, classes=("a", "b"))) == ()
    assert notes(FineTune(train=Train(batch_size=60), views=Views(size_px=19), encoder=SMALL), replace(small, classes=("a", "b"))) == ()


# ── Refused ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "workers", "sentence"),
    [
        (SimCLR(train=Train(batch_size=8, micro_batch=1)), (1, 2), "train.micro_batch 1 leaves BatchNorm a single image"),
        (
            SimCLR(train=Train(batch_size=8), encoder=Encoder(batchnorm="per_worker")),
            (8,),
            "per_worker and batch size 8 over 8 workers leave BatchNorm a single image; use --workers 4 or fewer",
        ),
        (SimCLR(views=Views(area=(1e-6, 1e-5))), (1,), r"views.area 1e-06 1e-05 cuts crops of 1.6 px out of 500 × 500 px"),
        (SimCLR(train=Train(batch_size=4096), loss=Loss(memory=8192 * 313)), (1,), "2,564,096 exceeds the 2,555,904 projections"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(config: Config, workers: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        notes(config, PHOTOS, *workers)


SINGLE = SimCLR(train=Train(batch_size=8), encoder=Encoder(batchnorm="per_worker"))


@pytest.mark.parametrize(
    ("config", "workers", "said"),
    [
        (SimCLR(train=Train(batch_size=8, micro_batch=1)), 1, "train.micro_batch 1 leaves BatchNorm a single image"),
        (SINGLE, 8, "encoder.batchnorm per_worker and batch size 8 over 8 workers leave BatchNorm a single image"),
        (SimCLR(views=Views(area=(1e-6, 1e-5))), 1, "views.area 1e-06 1e-05 cuts crops of 1.6 px out of 500 × 500 px"),
        (SimCLR(loss=Loss(memory=8192 * 313)), 1, "loss.memory 2,564,096 exceeds the 2,555,904 projections of an epoch"),
    ],
)
def test_of_a_run_under_way_it_is_said(config: Config, workers: int, said: str) -> None:
    found = sense.notes(config, PHOTOS, IMAGENET, (workers,), under_way=True)
    assert found == (f"{said}; this run goes on all the same, and a new one is refused",)


def test_what_can_is_not_refused() -> None:
    notes(SimCLR(train=Train(batch_size=8, micro_batch=1)), PHOTOS, 2, 4)  # BatchNorm sees one image of each worker
    notes(SimCLR(train=Train(batch_size=8), encoder=Encoder(batchnorm="per_worker")), PHOTOS, 4)
    notes(SimCLR(train=Train(batch_size=4096), loss=Loss(memory=8192 * 312)))
    notes(SimCLR(views=Views(area=(1e-6, 1.0))))  # the sampler takes no crop below a tenth of the image
    single = FineTune(train=Train(batch_size=8), encoder=Encoder(batchnorm="per_worker"), linear=True)
    notes(single, PHOTOS, 8)  # frozen statistics


def test_a_short_interval_of_evaluation_is_a_step_and_not_never() -> None:
    config = SimCLR(watch=Watch(every_epochs=0.001))
    assert config.watch_steps(IMAGENET) == 1 and replace(config, watch=Watch(every_epochs=0)).watch_steps(IMAGENET) == 0


# ── In the commands ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[driver.Job]:
    """The jobs that commands would train; their run.json is written."""
    found: list[driver.Job] = []

    def train(job: driver.Job, began: float) -> Run:
        found.append(job)
        job.run.save()
        return job.run

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return found


def test_every_command_says_it_and_run_json_has_it(
    jobs: list[driver.Job], patterns: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe("patterns_tiny")
    config = replace(config, train=replace(config.train, batch_size=24, epochs=1))
    pretrain.pretrain(pretrain.Args(data=patterns, config=config, recipe="patterns_tiny"))
    said = "the warm-up lasts 1 of 11 steps, a tenth of this short run, and not the 20 steps of 2 epochs"
    assert said in capsys.readouterr().err
    optim = Optim(warmup_epochs=20)
    finetune.finetune(finetune.Args(start=published, data=patterns, optim=optim, epochs=20, labels=0.1, batch_size=20))
    said_too = "the warm-up lasts 2 of 21 steps, a tenth of this short run, and not the 20 steps of 20 epochs"
    assert said_too in capsys.readouterr().err
    assert load_run(jobs[0].run.path).notes == (said,) and load_run(jobs[1].run.path).notes == (said_too,)
    replace(jobs[0].run, notes=()).save()
    assert "notes" not in json.loads((jobs[0].run.path / "run.json").read_text())  # versions of before refuse unknown fields


def test_a_student_too(jobs: list[driver.Job], patterns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from simclr.encoder.directory import write_encoder
    from simclr.methods.classifier import build_classifier
    from tests.support.small import TINY

    model = build_classifier(TINY, 10, 0)
    parts, linear = dict(model.encoder.state_dict()), dict(model.classifier.state_dict())
    write_encoder(parts, TINY, tmp_path / "teacher", {}, classifier=linear, classes=list(read_manifest(patterns).classes))
    distill.distill(distill.Args(teacher=tmp_path / "teacher", data=patterns, epochs=4, batch_size=24))
    assert "the warm-up lasts 4 of 41 steps, a tenth of this short run, and not the 200 steps of 20 epochs" in capsys.readouterr().err
    assert len(jobs[0].run.notes) == 1


def test_a_run_under_way_goes_on_with_its_command(jobs: list[driver.Job], patterns: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(recipe("patterns_tiny"), train=Train(batch_size=24, epochs=1), optim=Optim(warmup_epochs=0), loss=Loss(memory=528))
    args = pretrain.Args(data=patterns, config=config, recipe="patterns_tiny")
    with pytest.raises(UserError, match=r"loss.memory 528 exceeds the 480 projections of an epoch; use --loss.memory 480 or less"):
        pretrain.pretrain(args)
    run = open_run(None, "patterns_tiny", config, patterns)
    assert not run.path.exists()
    run.save()
    with pytest.raises(UserError, match=r"use --loss.memory 480"):  # nothing is trained yet
        pretrain.pretrain(args)
    (run.checkpoints / "step-00000003").mkdir(parents=True)
    said = "loss.memory 528 exceeds the 480 projections of an epoch; this run goes on all the same, and a new one is refused"
    assert said in pretrain.pretrain(args).notes and said in capsys.readouterr().err
    assert [job.run.created for job in jobs] == [run.created]


def test_a_sweep_under_way_goes_on(patterns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = a_sweep(tmp_path, "smoke", changes={"train.batch_size": 24, "train.micro_batch": 1})
    with pytest.raises(UserError, match=r"a single image; use --train.micro-batch 2 or more"):
        validate.check(sweep, read_manifest(patterns))
    assert validate.check(sweep, read_manifest(patterns), under_way=True)
    assert "a single image; this run goes on all the same" in capsys.readouterr().err


def test_a_sweep_says_it_once(patterns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"train.batch_size": 24, "train.epochs": 1}
    validate.check(a_sweep(tmp_path, "smoke", changes=changes), read_manifest(patterns))
    said = [line for line in capsys.readouterr().err.splitlines() if "the warm-up lasts" in line]
    assert len(said) == 1 and "trials" not in said[0]


def test_a_batch_above_the_images_names_the_flag_of_its_command(simclr: Command, patterns: Path, published: Path) -> None:
    for images, most in ((20, 20), (241, 240)):
        with pytest.raises(UserError, match=f"is larger than the {images} images to train on; use --batch-size {most} or less"):
            classifiers.batch_for(999, 1024, images, 2)
    few = ("finetune", published, "--data", patterns, "--labels", "0.1", "--batch-size", "30")
    refused(simclr(*few), "--batch-size 30 is larger than the 20 images to train on; use --batch-size 20 or less")
    refused(simclr("demo", "--train", "100"), "--train is 100; expected at least 128 images, a batch")
    refused(
        simclr("evaluate", published, "--data", patterns, "--protocol", "sgd", "--batch-size", "300"),
        "--batch-size 300 is larger than the training split; use --batch-size 240 or less",
    )


def test_the_quick_table_says_how_many_neighbours_voted(simclr: Command, patterns: Path, published: Path) -> None:
    words = ("evaluate", published, "--data", patterns, "--limit", "30", "--no-baselines")
    assert "kNN: all 30 labelled training images vote, since k is 500; a smaller --k tells more" in simclr(*words, "--k", "500")[2]
    assert "images vote" not in simclr(*words, "--k", "30")[2]


def test_resources_are_checked_first(patterns: Path) -> None:
    config = replace(recipe("patterns_tiny"), train=Train(batch_size=25))
    driver.require_shares(config, 240, ray_train.Resources(workers=2))
    with pytest.raises(UserError, match="batch_size 25 has no image for each of 26 workers"):
        driver.require_shares(config, 240, ray_train.Resources(workers=26))


def test_a_network_without_batchnorm_is_told_nothing_of_it() -> None:
    """A transformer with MoCo's head has none, under any name; SimCLR's head has some."""
    train = Train(batch_size=64, micro_batch=1)
    for encoder in (Encoder(vit="micro", patch_px=8), Encoder(timm="vit_tiny_patch16_224")):
        alone = MoCo(encoder=encoder, train=train, queue=640, views=Views(size_px=32))
        assert not sense.normalises(alone) and not [note for note in notes(alone, PHOTOS, 2, 4) if "BatchNorm" in note]
        assert sense.statistics_over(replace(alone, encoder=replace(encoder, batchnorm=4)), 6) == 6
        headed = SimCLR(encoder=encoder, train=train, views=Views(size_px=32))
        assert sense.normalises(headed)
        with pytest.raises(UserError, match="leaves BatchNorm a single image"):
            notes(headed)
    assert sense.normalises(MoCo(encoder=Encoder(timm="resnet10t"), views=Views(size_px=32)))


def test_a_resnets_fields_of_another_network_are_named() -> None:
    other = SimCLR(encoder=Encoder(vit="micro", patch_px=8, depth=18, cifar_stem=True), views=Views(size_px=32))
    said = "the encoder is ViT-micro/8, so encoder.depth 18 and encoder.cifar_stem True, a ResNet's, say nothing"
    assert said in notes(other)
    assert not [note for note in notes(SimCLR(encoder=Encoder(depth=18, cifar_stem=True))) if "say nothing" in note]
