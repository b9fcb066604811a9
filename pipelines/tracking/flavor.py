"""What makes the folder of a published encoder an MLflow model: MLmodel, requirements, an example, and the code that reads it."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import sys
from pathlib import Path

from pipelines.tracking import carried

_NEEDED = ("torch", "numpy", "pillow", "safetensors", "mlflow")
_DECODERS = ("opencv-python", "opencv-python-headless", "pillow-heif", "tifffile", "imagecodecs")


def describe(model: Path, run_id: str, scores: dict[str, float], model_id: str | None, timm: bool = False) -> str:
    """Write the files of an MLflow model, the logged model `model_id` where there is one, into the folder `model`; the encoder, which may
    be a network of `timm`'s, goes to `encoder` in it. Returns its name.

    By hand: `mlflow.pyfunc.save_model` copies the weights and looks for pip.
    """
    import numpy as np
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    # No schema of the input: MLflow has none that takes arrays, files and base64 alike, and its server would put what was sent into the
    # answer to what does not fit. `pyfunc.EncoderModel` says what it takes.
    features = Schema([TensorSpec(np.dtype(np.float32), (-1, -1))])
    spec = Model(run_id=run_id, signature=ModelSignature(outputs=features), metadata={"scores": scores}, model_id=model_id)
    spec.artifact_path = f"model-{spec.model_uuid}"
    example = [_picture()]
    (model / "input_example.json").write_text(json.dumps(example))
    (model / "serving_input_example.json").write_text(json.dumps({"inputs": example}))
    spec.saved_input_example_info = {
        "artifact_path": "input_example.json",
        "serving_input_path": "serving_input_example.json",
        "type": "json_object",
    }
    pyfunc.add_to_model(
        spec,
        loader_module=carried.write(model / "code"),
        code="code",
        data="encoder",
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        model_config={"paths": False, "device": "cpu"},
    )
    spec.save(str(model / "MLmodel"))
    (model / "requirements.txt").write_text("\n".join(requirements(timm)) + "\n")
    # A minor version of Python, since not every patch of it can be had. MLflow asks for conda's file too, whatever manager it uses.
    version = ".".join(map(str, sys.version_info[:2]))
    (model / "python_env.yaml").write_text(f'python: "{version}"\ndependencies:\n- -r requirements.txt\n')
    (model / "conda.yaml").write_text(
        f"channels:\n- conda-forge\ndependencies:\n- python={version}\n- pip\n- pip:\n  - -r requirements.txt\n"
    )
    return str(spec.artifact_path)


def requirements(timm: bool = False) -> list[str]:
    """All that a version needs, pinned as it is here: what this machine decodes pictures with, the version does, too, and timm with a
    network of its.

    Without this package: its code lies beside, and on the public index another project has its name.
    """
    needed = (*_NEEDED, "timm") if timm else _NEEDED
    pins = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in needed]
    there = {str(found.metadata["Name"]).lower().replace("_", "-"): found.version for found in importlib.metadata.distributions()}
    return [*pins, *(f"{name}=={there[name]}" for name in _DECODERS if name in there)]


def _picture() -> str:
    """A PNG of 8 × 8 pixels, in base64, as a served version takes it."""
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
