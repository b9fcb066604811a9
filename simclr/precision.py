"""The number formats of a run (`train.precision`), in one place."""

from __future__ import annotations

import torch

_WEIGHTS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


def weights_dtype(precision: str) -> torch.dtype:
    """The dtype of weights and statistics."""
    return _WEIGHTS[precision]


def views_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of views as the network gets them: where autocast would round them to bfloat16 first, a GPU writes them so."""
    return torch.bfloat16 if precision == "bfloat16" and device.type == "cuda" else _WEIGHTS[precision]


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which matrix products and convolutions are bfloat16, where `precision` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def set_backends(precision: str, device: torch.device) -> None:
    """Let this process's CUDA libraries multiply as `precision` says, and choose among their convolutions by measuring.

    cuDNN's own default rounds the factors of float32 convolutions to TF32's 10 bits, while matrix products stay float32: so "float32"
    would mean two things. Shapes are the same at every step, so measuring once pays; which algorithm wins, and so the last bits of a sum,
    may differ between two starts.
    """
    if device.type != "cuda":
        return
    # The older names of these settings: torch 2.11 to 2.15 know them, and its compiler reads them.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
