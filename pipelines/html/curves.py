"""What a run's page draws and says of training: the curves by the run's method, its loss in words, and its chance level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipelines.html.charts import Quantity
from simclr.papers import unscored

Flat = Mapping[str, str | int | float | bool | None]
"""A config: "optim.base_lr" → 0.3."""


@dataclass(frozen=True, slots=True)
class Words:
    """What a page says of a method."""

    task: str
    """What the network learns to do, for "it …"."""
    loss: str
    unit: str = "nats"
    chance: tuple[float, str] | None = None
    """The loss of guessing, and its name; None = there is none to draw."""
    partner: str = ""
    """What `train/contrastive_top1` counts."""
    views: tuple[str, str] = ("view 0", "view 1")
    """The pictures below an original."""
    given: str = "the two random views of it that the network is given"
    """They, in a sentence."""
    measure: str = ""
    """What the number of the loss is, ahead of "after N steps"; "" = the curve says it."""
    against: str = ""
    """With what to compare it, behind "it began at X"."""


def words(method: str, config: Flat) -> Words:
    """Of a pretraining by `method`, one of `simclr.family.METHODS`, or of a later stage by its name. One that a newer version has is said
    to have a loss, and no more."""
    n, k, tau = (_number(config, name) for name in ("train.batch_size", "queue", "temperature"))
    match method:
        case "simclr":
            return _simclr(config, n)
        case "moco":
            both = 2 if config.get("symmetric") else 1
            alike = both * math.log(k + 1)
            each = "the sum over both views as queries, and " if both == 2 else ""
            return Words(
                task="it learns to tell, by one view, the key of the other among the keys of earlier images",
                loss="InfoNCE: minus the log of the probability that a query gives to its own key, the moving average’s of the other view, "
                f"among the {k:,.0f} keys of the queue; {each}the mean since the last report. It begins low, since no random key of the "
                "first queue is like a query, and rises before it falls.",
                chance=(alike, f"{'2 ' if both == 2 else ''}ln(K + 1): all keys alike"),
                against=f", since the first queue is random; all keys alike give {alike:.3f}",
                partner="share of queries whose own key is the nearest among the candidates.",
            )
        case "mocov3":
            return Words(
                task="it learns to tell, by one view, the key of the other among those of the batch",
                loss="InfoNCE × 2τ: minus the log of the probability that a prediction gives to its own key, the moving average’s of the "
                "other view, among the keys of the batch; the sum over both views, and the mean since the last report.",
                chance=(4 * tau * math.log(max(n, 1)), "4τ ln N: all keys alike"),
                partner="share of predictions whose own key is the nearest among the keys of the batch.",
            )
        case "byol":
            return Words(
                task="it learns to predict, by one view, what a moving average of itself makes of the other",
                loss="squared distance on the unit sphere between a view’s prediction and what the moving average makes of the other view; "
                "the sum over both views, and the mean since the last report. There are no negatives: a loss near 0 is good only while "
                "the spread stays.",
                unit="",
                chance=(4.0, "4: predictions at right angles"),
                partner="share of projections whose partner, the other view’s, is the nearest in the batch, for which no loss asks.",
            )
        case "swav":
            k = _number(config, "prototypes")
            return Words(
                task="it learns to tell, by each crop, to which prototypes the image’s other large view was assigned",
                loss="cross entropy of a crop’s softmax over the prototypes with the assignment of another large view, in which all "
                "prototypes have equal shares of the batch; the mean over pairs of crops, and since the last report. A run that stays at "
                "ln K has prototypes that mean nothing.",
                chance=(math.log(max(k, 1)), "ln K: all prototypes alike"),
                partner="share of projections whose partner, the other view’s, is the nearest in the batch, for which no loss asks.",
            )
        case "dino":
            k = _number(config, "d_out")
            return Words(
                task="it learns to give, by each crop, the softmax that a moving average of itself gives for another large view",
                loss="cross entropy of a crop’s softmax with the moving average’s, centred and sharpened, of another large view; the mean "
                "over pairs of crops, and since the last report. There are no negatives: a run that stays at ln K, or falls to 0, has "
                "collapsed.",
                chance=(math.log(max(k, 1)), "ln K: all alike"),
                partner="share of views whose partner, the other view of the image, is the nearest in the batch, for which no loss asks.",
            )
        case "mae":
            normalised = bool(config.get("normalised", True))
            return Words(
                task="it learns to paint the patches of an image that it does not see",
                loss="mean square error of the patches that are hidden"
                + (", each normalised by its own mean and deviation" if normalised else "")
                + "; the mean since the last report.",
                unit="",
                chance=(1.0, "1: grey patches") if normalised else None,
                measure="mean square error of hidden patches" + (", in normalised pixels, " if normalised else ", "),
                against=", and grey patches give 1" if normalised else "",
                views=("crop", "seen"),
                given="a random crop of it, and the patches of that which the encoder sees",
            )
        case "clip":
            return Words(
                task="it learns which caption belongs to which image of the batch",
                loss="cross entropy of an image with the captions of the batch and of a caption with its images, the mean of both, by "
                "cosines over a learnt temperature; the mean since the last report.",
                chance=(math.log(n), "ln N: all captions alike") if n > 1 else None,
                partner="share of images and captions whose partner is the nearest among all others, images and captions.",
                views=("crop", "another"),
                given="a random crop of it, beside its caption, and how another crop would look",
            )
        case "finetune":
            return Words("it learns the labels", "cross entropy of the classifier with the labels; the mean since the last report.")
        case "distill":
            return Words("it learns the teacher’s probabilities", "cross entropy with the teacher’s probabilities, and with labels if any.")
    return Words("it learns without labels", "the objective of the method; the mean since the last report.", unit="")


def _simclr(config: Flat, n: float) -> Words:
    task, name, queue = (
        "it learns to tell which two views belong together",
        config.get("loss.name", "nt_xent"),
        _number(config, "loss.memory"),
    )
    partner = "share of views whose partner, the other view of the same image, is the nearest among the candidates in the batch."
    if not str(name).startswith("nt_xent"):
        return Words(
            task, f"{name}, one of the losses that the paper compares with NT-Xent; the mean since the last report.", "", None, partner
        )
    among = f", and {queue:,.0f} of earlier batches" if queue else ""
    chance = (math.log(2 * n - 1 + queue), f"ln(2N − 1{' + K' if queue else ''}): all views alike") if n > 1 else None
    return Words(
        task,
        f"NT-Xent: minus the log of the probability that a view gives to its partner among all other views of the batch{among}; "
        "the mean since the last report.",
        chance=chance,
        partner=partner,
    )


def _number(config: Flat, name: str) -> float:
    value = config.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def quantities(method: str, said: Words) -> tuple[Quantity, ...]:
    """The curves of a run of `method`, in their order."""
    alone = {"simclr": (), "mae": (), "finetune": (), "distill": (), "swav": _AVERAGES[:1], "clip": _TEXTS}
    own = alone.get(method, _AVERAGES)
    aside, _, _ = unscored(method).partition(": ")
    marked = f" {aside[:1].upper()}{aside[1:]}." if aside else ""
    shared = (replace(q, meaning=q.meaning + marked) if q.key == "eval/knn_top1" else q for q in _QUANTITIES)
    if method == "clip":
        between = "mean squared distance between an image and its caption on the unit sphere; 0 is perfect."
        shared = (replace(q, meaning=between) if q.key == "health/alignment" else q for q in shared)
    return (*_learning(said), *shared, *own)


def _learning(said: Words) -> tuple[Quantity, ...]:
    return (
        Quantity(
            key="train/loss",
            name="Loss",
            unit=said.unit,
            digits=".4g",
            from_zero=False,
            meaning=said.loss,
        ),
        Quantity(
            key="train/contrastive_top1",
            name="Contrastive top-1",
            unit="%",
            share=True,
            meaning=said.partner,
        ),
    )


_QUANTITIES = (
    Quantity(
        key="eval/knn_top1",
        name="kNN top-1",
        unit="%",
        share=True,
        meaning="weighted kNN on the test split while training goes on. The encoder never learns from a label.",
    ),
    Quantity(
        key="train/linear_top1",
        name="Linear top-1",
        unit="%",
        share=True,
        meaning="hits of a linear classifier that learns beside the encoder from its features, on the views of the training "
        "images. Its gradient stops before the encoder.",
    ),
    Quantity(key="train/lr", name="Learning rate", digits=".4g", meaning="as the optimizer used it, after the scaling rule."),
    Quantity(key="speed/images_per_s", name="Images per second", digits=",.0f", meaning="images, not views, over all workers."),
    Quantity(
        key="health/rankme",
        name="Effective rank",
        unit="dimensions",
        digits=",.1f",
        meaning="RankMe, the number of dimensions that the features fill. A fall towards 1 is a collapse.",
    ),
    Quantity(
        key="health/alignment",
        name="Alignment",
        meaning="mean squared distance between the two views of an image on the unit sphere; 0 is perfect.",
    ),
    Quantity(
        key="health/uniformity",
        name="Uniformity",
        from_zero=False,
        meaning="log of the mean of exp(−2 d²) over pairs of views, d apart on the unit sphere; lower is more evenly spread.",
    ),
)
_TEXTS = (
    Quantity(
        key="eval/zero_shot_top1",
        name="Zero-shot top-1",
        unit="%",
        share=True,
        meaning="test images whose nearest class name, in the common space of images and texts, is their own. No label is learnt from.",
    ),
    Quantity(
        key="train/temperature",
        name="Temperature",
        digits=".3g",
        from_zero=False,
        meaning="by which cosines are divided; it is learnt.",
    ),
)
_AVERAGES = (
    Quantity(
        key="health/spread",
        name="Spread",
        meaning="of what the loss compares, over the unit sphere: 1 is even. A fall towards 0 is a collapse, where all point the same way.",
    ),
    Quantity(
        key="train/ema",
        name="Average keeps",
        digits=".5g",
        from_zero=False,
        meaning="the share of itself that the moving average, which makes the targets, keeps at a step.",
    ),
)
