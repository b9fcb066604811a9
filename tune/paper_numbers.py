"""The paper's own numbers, for the light marks in the figures: linear evaluation on ImageNet, ResNet-50, top-1 in per cent.

Only numbers that the paper prints. Its Fig. 7, 8 and 9 print none, so the figures that repeat them have no marks.
"""

from __future__ import annotations

V1, V2 = "arXiv:2002.05709", "arXiv:2006.10029"

FIG_5_OPERATIONS = ("crop", "cutout", "colour", "sobel", "noise", "blur", "rotate")
FIG_5 = (
    (33.1, 33.9, 56.3, 46.0, 39.9, 35.0, 30.2),
    (32.2, 25.6, 33.9, 40.0, 26.5, 25.2, 22.4),
    (55.8, 35.5, 18.8, 21.0, 11.4, 16.5, 20.8),
    (46.2, 40.6, 20.9, 4.0, 9.3, 6.2, 4.2),
    (38.8, 25.8, 7.5, 7.6, 9.8, 9.8, 9.6),
    (35.1, 25.2, 16.6, 5.8, 9.7, 2.6, 6.7),
    (30.0, 22.5, 20.7, 4.3, 9.7, 6.5, 2.6),
)
"""Fig. 5: row = first operation, column = second, diagonal = the operation alone."""
FIG_5_MEANS = (39.2, 29.4, 25.7, 18.8, 15.5, 14.5, 13.8)
"""Its last column: the mean of each row, of unrounded values."""

TABLE_1: dict[tuple[float, bool], float] = {
    (1 / 8, False): 59.6,
    (1 / 4, False): 61.0,
    (1 / 2, False): 62.6,
    (1.0, False): 63.2,
    (1.0, True): 64.5,
}
"""Table 1, SimCLR's row: (colour strength, with blur)."""

TABLE_4: dict[tuple[str, bool], float] = {
    ("margin_triplet", False): 50.9,
    ("nt_logistic", False): 51.6,
    ("margin_triplet", True): 57.5,
    ("nt_logistic", True): 57.9,
    ("nt_xent", False): 63.9,
}
"""Table 4: (loss, semi-hard negatives)."""

TABLE_5: dict[tuple[str, float], float] = {
    ("nt_xent", 0.05): 59.7,
    ("nt_xent", 0.1): 64.4,
    ("nt_xent", 0.5): 60.7,
    ("nt_xent", 1.0): 58.0,
    ("nt_xent_dot", 10.0): 57.2,
    ("nt_xent_dot", 100.0): 57.0,
}
"""Table 5: (with ℓ2 normalisation or without, τ)."""

V2_TABLE_1: dict[str, dict[float, float]] = {
    "ResNet-50": {0.01: 57.9, 0.1: 68.4, 1.0: 76.3},
    "ResNet-152 (3×, SK)": {0.01: 74.9, 0.1: 80.1, 1.0: 83.1},
}
"""v2's Table 1, fine-tuned with a share of the labels."""
