"""What people call each method, and whose it is: one table for listings, cards and reports."""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paper:
    """A paper on arXiv."""

    authors: str
    title: str
    arxiv: str


@dataclass(frozen=True, slots=True)
class Named:
    """A method by the field's name for it."""

    title: str
    papers: tuple[Paper, ...]

    @property
    def cited(self) -> str:
        """The papers' numbers, for a line: arXiv:2002.05709, 2006.10029."""
        return f"arXiv:{', '.join(paper.arxiv for paper in self.papers)}"


NAMED = {
    "simclr": Named(
        "SimCLR",
        (
            Paper(
                "Chen, Kornblith, Norouzi, Hinton", "A Simple Framework for Contrastive Learning of Visual Representations", "2002.05709"
            ),
            Paper(
                "Chen, Kornblith, Swersky, Norouzi, Hinton", "Big Self-Supervised Models are Strong Semi-Supervised Learners", "2006.10029"
            ),
        ),
    ),
    "moco": Named(
        "MoCo",
        (
            Paper("He, Fan, Wu, Xie, Girshick", "Momentum Contrast for Unsupervised Visual Representation Learning", "1911.05722"),
            Paper("Chen, Fan, Girshick, He", "Improved Baselines with Momentum Contrastive Learning", "2003.04297"),
        ),
    ),
    "mocov3": Named(
        "MoCo v3", (Paper("Chen, Xie, He", "An Empirical Study of Training Self-Supervised Vision Transformers", "2104.02057"),)
    ),
    "byol": Named(
        "BYOL",
        (
            Paper(
                "Grill, Strub, Altché, Tallec, Richemond, Buchatskaya, Doersch, Avila Pires, Guo, Gheshlaghi Azar, Piot, Kavukcuoglu, "
                "Munos, Valko",
                "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
                "2006.07733",
            ),
        ),
    ),
    "swav": Named(
        "SwAV",
        (
            Paper(
                "Caron, Misra, Mairal, Goyal, Bojanowski, Joulin",
                "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
                "2006.09882",
            ),
        ),
    ),
    "dino": Named(
        "DINO",
        (
            Paper(
                "Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin",
                "Emerging Properties in Self-Supervised Vision Transformers",
                "2104.14294",
            ),
        ),
    ),
    "mae": Named("MAE", (Paper("He, Chen, Xie, Li, Dollár, Girshick", "Masked Autoencoders Are Scalable Vision Learners", "2111.06377"),)),
    "clip": Named(
        "CLIP",
        (
            Paper(
                "Radford, Kim, Hallacy, Ramesh, Goh, Agarwal, Sastry, Askell, Mishkin, Clark, Krueger, Sutskever",
                "Learning Transferable Visual Models From Natural Language Supervision",
                "2103.00020",
            ),
        ),
    ),
}
"""Name of a method, as in `simclr.family.METHODS` → what people call it."""


def named(method: str) -> Named:
    """The `method` of this name; one that a newer version has is called by its name and cites nothing."""
    return NAMED.get(method) or Named(method, ())


def adamw(base_lr: str) -> str:
    """The flags with which authors of vision transformers train on labels or a teacher's answers, with a `base_lr` of their own."""
    return f"--optim.name adamw --optim.base-lr {base_lr} --optim.scaling linear --optim.weight-decay 0.05 --optim.warmup-epochs 5"


TUNED = f"{adamw('1e-3')} --optim.layer-decay 0.75"
"""The flags to fine-tune a vision transformer, as MAE's authors (arXiv:2111.06377, App. A.1, Tab. 9) and the bench of methods have them."""


def unscored(method: str, run: str = "RUN") -> str:
    """A sentence where kNN and linear probes are no score of `method`, with the command that finds one for `run`; "" where they are."""
    if method != "mae":
        return ""
    command = f"simclr finetune {shlex.quote(run)} --encoder.pool mean {TUNED}"
    return f"neighbours in its features and linear probes are no score of MAE; fine-tuning is: {command}"
