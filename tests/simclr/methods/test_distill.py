"""Distillation: Eq. 2 and 3 by hand, their gradient, ranks, and the student's loop."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr.collectives import all_gather, world_size
from simclr.config import Encoder, Optim, Train, Watch
from simclr.encoder.directory import write_encoder
from simclr.errors import UserError
from simclr.methods.classifier import build_classifier
from simclr.methods.distill import distillation_loss
from simclr.stages import Distill
from simclr.train import Start, train
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import TINY, mine

TAUGHT = Distill(
    encoder=TINY.encoder,
    views=TINY.views,
    optim=Optim(base_lr=0.005, scaling="sqrt", warmup_epochs=0, weight_decay=1e-4),
    train=Train(batch_size=22, steps=4, precision="float64", report_every_steps=1, checkpoint_every_steps=4),
    watch=Watch(every_epochs=0),
    temperature=0.5,
    alpha=0.7,
)


def by_hand(scores: Tensor, teacher: Tensor, labels: list[int], temperature: float, alpha: float) -> float:
    """Eq. 3, term by term, over the number of rows."""

    def p(row: Tensor, y: int, tau: float) -> float:
        return math.exp(row[y].item() / tau) / sum(math.exp(value / tau) for value in row.tolist())

    total = 0.0
    for student, taught, label in zip(scores, teacher, labels, strict=True):
        if label >= 0:
            total -= (1 - alpha) * math.log(p(student, label, 1.0))
        for y in range(len(student)):
            total -= alpha * p(taught, y, temperature) * math.log(p(student, y, temperature))
    return total / len(scores)


def draw(rows: int, classes: int, seed: int) -> Tensor:
    return torch.randn(rows, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LABELS = [2, -1, 0, -1, 4, -1]


@pytest.mark.parametrize(("temperature", "alpha"), [(0.1, 1.0), (1.0, 1.0), (0.5, 0.3)])
def test_loss_and_gradient_are_the_equations(within: Within, temperature: float, alpha: float) -> None:
    scores, teacher = draw(6, 5, 0).requires_grad_(), draw(6, 5, 1)
    loss = distillation_loss(scores, teacher, torch.tensor(LABELS), temperature, alpha)
    within("loss", abs(loss.item() - by_hand(scores.detach(), teacher, LABELS, temperature, alpha)), 1e-12)
    (found,) = torch.autograd.grad(loss, scores)
    # α (P_S − P_T) / τ of every row, and (1 − α) (P_S(τ = 1) − onehot) of the labelled ones.
    s = scores.detach()
    expected = alpha * ((s / temperature).softmax(1) - (teacher / temperature).softmax(1)) / temperature
    for row, label in enumerate(LABELS):
        if label >= 0:
            expected[row] += (1 - alpha) * (s[row].softmax(0) - nn.functional.one_hot(torch.tensor(label), 5))
    within("gradient", float((found - expected / 6).abs().max()), 1e-12)


def test_a_student_that_agrees_has_the_teachers_entropy_and_no_gradient(within: Within) -> None:
    teacher = draw(6, 5, 1).requires_grad_()
    p = (teacher.detach() / 0.3).softmax(1)
    loss = distillation_loss(teacher, teacher.detach(), torch.tensor(LABELS), 0.3)
    within("entropy", abs(loss.item() + (p * p.log()).sum(1).mean().item()), 1e-12)
    within("gradient", float(torch.autograd.grad(loss, teacher)[0].abs().max()), 1e-12)


def loss_and_gradients() -> tuple[float, list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network: nn.Module = nn.Linear(7, 5).double()
    if world_size() > 1:
        network = DistributedDataParallel(network)
    # All labels are on one rank: the mean over ranks is still the batch's.
    scores = network(mine(draw(6, 7, 3)))
    loss = distillation_loss(scores, mine(draw(6, 5, 1)), mine(torch.tensor([2, 1, 0, -1, -1, -1])[:, None])[:, 0], 0.5, 0.3)
    loss.backward()
    return all_gather(loss.detach().view(1)).mean().item(), [p.grad for p in network.parameters() if p.grad is not None]


def test_two_ranks_take_the_gradient_of_one(ranks: Ranks, within: Within) -> None:
    expected, gradients = loss_and_gradients()
    for loss, found in ranks(2, loss_and_gradients):
        within("loss", abs(loss - expected), 1e-9)
        within("gradient", max(float((a - b).abs().max()) for a, b in zip(found, gradients, strict=True)), 1e-9)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained classifier of patterns with confident scores."""
    from simclr.data.sources.patterns import CLASSES

    model = build_classifier(dataclasses.replace(TINY, seed=3), 10, 0)
    nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
    out = tmp_path_factory.mktemp("teacher") / "encoder"
    tensors = model.classifier.state_dict()
    write_encoder(model.encoder.state_dict(), TINY, out, {}, classifier=tensors, classes=sorted(CLASSES))
    return out


def steps(config: Distill, data: Path, teacher: Path, ids: np.ndarray | None) -> tuple[list[float], dict[str, Tensor]]:
    reports = list(train(config, Start(data, teacher=teacher, labelled=ids)))
    return [r.metrics["train/loss"] for r in reports], reports[-1].state.tensors


def test_a_student_on_two_and_on_three_ranks_is_that_of_one(patterns: Path, teacher: Path, ranks: Ranks, within: Within) -> None:
    """Eq. 3, with a label for every fourth image. A smaller network than the teacher's would do as well."""
    ids = np.arange(0, 240, 4)
    losses, tensors = steps(TAUGHT, patterns, teacher, ids)
    assert losses[-1] < losses[0] and not any(name.startswith("model.head") for name in tensors)
    for world in (2, 3):  # of 22 images three have 7, 7 and 8
        for found, theirs in ranks(world, steps, TAUGHT, patterns, teacher, ids):
            within(f"loss, W = {world}", max(abs(a - b) for a, b in zip(losses, found, strict=True)), 1e-9)
            within(f"weights, W = {world}", max(float((theirs[name] - tensors[name]).abs().max()) for name in tensors), 1e-9)
    # Without the labels it is Eq. 2: another loss from the first step on.
    assert steps(dataclasses.replace(TAUGHT, alpha=1.0), patterns, teacher, None)[0][0] != losses[0]


def test_a_student_of_another_size_learns_the_teacher(patterns: Path, teacher: Path) -> None:
    wide = dataclasses.replace(TAUGHT, encoder=Encoder(depth=8, width=2, cifar_stem=True), alpha=1.0)
    losses, tensors = steps(dataclasses.replace(wide, train=dataclasses.replace(wide.train, precision="float32")), patterns, teacher, None)
    assert losses[-1] < losses[0] and tensors["model.classifier.weight"].shape == (10, 128)


def test_a_teacher_of_other_classes_is_refused(photographs: Path, patterns: Path, teacher: Path, tmp_path: Path) -> None:
    from simclr.methods.distill import require_teacher

    with pytest.raises(UserError, match=r"the teacher tells 10 classes .* apart, the data has 2 classes \(cat, dog\)"):
        require_teacher(teacher, ("cat", "dog"))
    model = build_classifier(TINY, 10, 0)
    write_encoder(model.encoder.state_dict(), TINY, tmp_path / "plain", {})
    with pytest.raises(UserError, match="holds no classifier to learn from; `simclr finetune` makes one"):
        next(train(TAUGHT, Start(patterns, teacher=tmp_path / "plain")))
    with pytest.raises(UserError, match="alpha is 0"):
        dataclasses.replace(TAUGHT, alpha=0)


def test_the_commands_from_an_encoder_to_a_student(
    shared_ray: None, patterns: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fine-tune on a tenth of the labels, distil into a wider student; the same command again has nothing left to do."""
    from pipelines import cli
    from pipelines.runs.directory import load_run
    from pipelines.train import classifiers

    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    tuned, student = tmp_path / "tuned", tmp_path / "student"
    few = ["--data", str(patterns), "--tracking-uri", tracking, "--epochs", "1"]
    first = ["finetune", str(published), *few, "--labels", "0.1", "--run", str(tuned)]
    second = ["distill", str(tuned), *few[2:], "--run", str(student), "--encoder.width", "2", "--batch-size", "120", "--alpha", "0.5"]
    second += ["--workers", "1", "--optim.warmup-epochs", "0", "--label-file", str(tuned / "labels.txt")]
    for argv in (first, second):
        cli.main(argv)
    run = load_run(student)
    assert (run.stage, run.recipe, run.config.encoder.width, run.data) == ("distill", "distill-encoder", 2, patterns)
    assert isinstance(run.config, Distill) and (run.config.temperature, run.config.alpha) == (1.0, 0.5)
    lines = [(folder / "labels.txt").read_text().splitlines() for folder in (tuned, student)]
    assert [line for line in lines[0] if line[0] != "#"] == [line for line in lines[1] if line[0] != "#"] and len(lines[0]) == 25
    scores = classifiers.scores_of(run)
    told = capsys.readouterr().out.splitlines()
    shown = ", ".join(f"{name} {100 * scores[name.replace(' ', '_')]:.1f} %" for name in ("top1", "top5", "mean per class"))
    assert told[-1] == f"{student}: {shown}"
    assert load_run(tuned).tracking_run and [row["step"] for row in load_run(tuned).history()] == [1, 2]
    cli.main(second)
    assert "is complete: 3 of 3 steps; nothing to do" in capsys.readouterr().err
