"""What the small install leaves out, and how it is added. The one place that says so."""

from __future__ import annotations

import importlib.util

DISTRIBUTION = "simclr-cluster"
"""The name for pip, in pyproject.toml too; the import is `simclr`, a name that another distribution has taken."""
_TRAIN = {
    "ffcv": "FFCV",
    "numba": "FFCV",
    "llvmlite": "FFCV",
    "cv2": "OpenCV",
    "ray": "Ray",
    "mlflow": "MLflow",
    "requests": "MLflow",
    "urllib3": "MLflow",
    "boto3": "boto3",
    "botocore": "boto3",
    "sklearn": "scikit-learn",
    "scipy": "SciPy",
    "psutil": "Ray",
    "yaml": "PyYAML",
    "jsonschema": "jsonschema",
}
_EXTRAS = {
    "train": _TRAIN,
    "onnx": {"onnx": "ONNX", "onnxruntime": "ONNX Runtime", "onnxscript": "onnxscript"},
    "tensorflow": {"tensorflow": "TensorFlow"},
    "images": {"pillow_heif": "pillow-heif", "tifffile": "tifffile", "imagecodecs": "imagecodecs"},
    "optuna": {"optuna": "Optuna"},
    "hub": {"huggingface_hub": "huggingface_hub"},
    "tensorboard": {"tensorboard": "TensorBoard"},
    "timm": {"timm": "timm"},
    "pairs": {"open_clip": "open_clip_torch"},
}


def has(module: str) -> bool:
    """Whether the top-level `module` is installed; it is not imported."""
    return importlib.util.find_spec(module) is not None


def command(extra: str) -> str:
    """What to type for an extra of pyproject.toml."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def absent(error: ModuleNotFoundError) -> str:
    """`Ray, which is not installed; pip install '…[train]'`, where a module of an extra was missing; else ""."""
    top = (error.name or "").partition(".")[0]
    for extra, libraries in _EXTRAS.items():
        if top in libraries and not has(top):
            return f"{libraries[top]}, which is not installed here: {command(extra)}"
    return ""
