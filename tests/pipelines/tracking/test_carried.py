"""A registered version carries its code: it is read where nothing of this package is, by MLflow and its server."""

from __future__ import annotations

import base64
import importlib
import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import simclr
from pipelines.tracking import carried, flavor
from simclr.config import Encoder, SimCLR, Views
from simclr.encoder.directory import write_encoder
from simclr.networks.encoders import build_encoder

ONE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
_PNG = io.BytesIO()
Image.fromarray(ONE).save(_PNG, "PNG")
TEXT = base64.b64encode(_PNG.getvalue()).decode()


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("version")
    config = SimCLR(encoder=Encoder(depth=8, cifar_stem=True), views=Views(size_px=32))
    write_encoder(dict(build_encoder(config.encoder).state_dict()), config, folder / "encoder", {})
    flavor.describe(folder, "0" * 32, {"knn_top1": 0.5}, None)
    return folder


@pytest.fixture(scope="module")
def served(version: Path) -> Any:
    return importlib.import_module("mlflow.pyfunc").load_model(str(version))


@pytest.fixture(scope="module")
def features(version: Path) -> np.ndarray:
    return simclr.load_encoder(version / "encoder").embed(ONE).numpy()


def answer(served: Any, body: object) -> tuple[int, dict[str, Any]]:
    """What MLflow's server answers, with its HTTP status."""
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import scoring_server

    try:
        found = scoring_server.invocations(json.dumps(body), "application/json", served, served.metadata.get_input_schema())
    except MlflowException as error:
        return error.get_http_status_code(), json.loads(error.serialize_as_json())
    return found.status, json.loads(found.response)


def test_embedding_imports_nothing_but_what_lies_there(version: Path, features: np.ndarray) -> None:
    """In a process that has neither this package nor what only training, the registry and the loader need."""
    (package,) = (version / "code").iterdir()
    code = f"""
        import sys
        names = ("simclr", "pipelines", "tune", "ray", "mlflow", "ffcv", "numba", "boto3", "pandas", "tyro", "rich", "torchvision", "cv2")
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in names:
                    raise ImportError(f"{{name}} is asked for")
        sys.meta_path.insert(0, Refuse())
        sys.path.insert(0, {str(version / "code")!r})
        from {package.name}.simclr.encoder.directory import read_encoder
        from pathlib import Path
        import base64, json
        encoder = read_encoder(Path({str(version / "encoder")!r}))
        print(json.dumps(encoder.embed(base64.b64decode({TEXT!r})).tolist()))
    """
    done = subprocess.run([sys.executable, "-I", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, cwd=version)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), features, atol=1e-6)


def test_the_code_has_a_name_of_its_own_and_is_the_same_to_the_letter(version: Path, served: Any) -> None:
    """Another package called simclr neither hides it nor is hidden; torch knows its operations beside those of this one."""
    (package,) = (version / "code").iterdir()
    assert served.loader_module == f"{package.name}.pipelines.tracking.pyfunc" and sys.modules["simclr"] is simclr
    for name in carried.modules():
        here = (Path(simclr.__file__).parents[1] / name.replace(".", "/")).with_suffix(".py").read_text()
        there = (package / name.replace(".", "/")).with_suffix(".py").read_text()
        assert there.replace(f"{package.name}.", "").replace(f"{package.name}::", "simclr::") == here, name
        compile(there, name, "exec")
    assert "simclr.networks.vit" in carried.modules()
    assert not {name.split(".")[1] for name in carried.modules()} & {"train", "methods", "commands", "runs"}
    assert not [path for path in version.rglob("*") if path.suffix in (".pkl", ".pt", ".pth")]


def test_other_code_has_another_name(version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = carried.write(tmp_path / "same").partition(".")[0]
    assert [path.name for path in (version / "code").iterdir()] == [before]
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a: read(path, *a) + ("\n# changed\n" if path.name == "pixels.py" else ""))
    assert carried.write(tmp_path / "other").partition(".")[0] != before


def test_requirements_are_whole_and_pinned(version: Path) -> None:
    lines = (version / "requirements.txt").read_text().splitlines()
    names = {line.partition("==")[0] for line in lines}
    assert names >= {"torch", "numpy", "pillow", "safetensors", "mlflow"} and all("==" in line and "+" not in line for line in lines)
    assert "simclr" not in names  # on the public index it is somebody else's
    text = (version / "MLmodel").read_text()
    assert "conda.yaml" in text and "python_env.yaml" in text and (version / "conda.yaml").is_file()  # MLflow's server asks for both
    assert f'python: "{sys.version_info[0]}.{sys.version_info[1]}"' in (version / "python_env.yaml").read_text()


def test_it_takes_what_people_send(served: Any, features: np.ndarray, tmp_path: Path) -> None:
    import pandas as pd

    (tmp_path / "one.png").write_bytes(_PNG.getvalue())
    raw, path = _PNG.getvalue(), tmp_path / "one.png"
    for given in (
        *(ONE, ONE[None], [ONE], ONE.astype(np.int64), ONE.tolist(), [ONE.tolist()], Image.fromarray(ONE), raw, [raw], path, [path]),
        *(TEXT, [TEXT], [TEXT[:76] + "\n" + TEXT[76:]], f"data:image/png;base64,{TEXT}", {"image": [TEXT]}, [{"b64": TEXT}]),
        *(np.array([TEXT]), np.array(TEXT), pd.Series([TEXT])),
        *(pd.DataFrame({"any": [cell]}) for cell in (raw, TEXT, ONE, ONE.tolist(), path)),
    ):
        np.testing.assert_array_equal(served.predict(given), features)
    assert served.predict([ONE, ONE[:40]]).shape == served.predict([ONE.tolist(), ONE[:40].tolist()]).shape == (2, 64)
    assert served.predict([]).shape == served.predict(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, 64)
    assert served.predict(served.input_example).shape == (1, 64)


def test_the_server_answers_json_of_every_form(served: Any, features: np.ndarray) -> None:
    for body in (
        *({"inputs": TEXT}, {"inputs": [TEXT]}, {"inputs": {"image": [TEXT]}}, {"inputs": [ONE.tolist()]}, {"instances": [TEXT]}),
        *({"instances": [{"b64": TEXT}]}, {"dataframe_split": {"columns": ["x"], "data": [[TEXT]]}}),
        *({"dataframe_records": [{"x": TEXT}]}, {"dataframe_records": [{"x": ONE.tolist()}]}),
    ):
        status, found = answer(served, body)
        assert status == 200, found
        np.testing.assert_allclose(found["predictions"], features, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"inputs": ["/etc/hostname"]}, "picture 1 of 1 is a text of 13 characters that is no base64 of an image file"),
        ({"inputs": [TEXT, "QUJD"]}, "picture 2 of 2 is base64 of no image that can be read"),
        ({"inputs": (ONE / 255).tolist()}, "got float64 of shape (50, 70, 3)"),
        ({"inputs": (ONE.astype(int) * 3).tolist()}, "got int64 of shape (50, 70, 3)"),
        ({"dataframe_records": [{"x": [[TEXT]]}]}, "are no numbers"),
        ({"dataframe_split": {"columns": ["a", "b"], "data": [[TEXT, TEXT]]}}, "got 2 columns (a, b); expected one"),
        ({"dataframe_records": [{"x": None}]}, "picture 1 of 1 is of type NoneType"),
    ],
)
def test_a_wrong_input_is_told_in_a_sentence_without_its_pixels(served: Any, body: dict[str, Any], sentence: str) -> None:
    status, found = answer(served, body)
    assert status == 400 and sentence in found["message"] and len(found["message"]) < 300, found
    assert TEXT[:20] not in json.dumps(found) and "stack_trace" not in found


def test_paths_are_read_only_where_the_model_was_told_so(version: Path, features: np.ndarray, tmp_path: Path) -> None:
    """A server that opens what a stranger names gives away which files there are, and pictures among them."""
    (tmp_path / "one.png").write_bytes(_PNG.getvalue())
    pyfunc = importlib.import_module("mlflow.pyfunc")
    told = pyfunc.load_model(str(version), model_config={"paths": True})
    np.testing.assert_array_equal(told.predict([str(tmp_path / "one.png"), TEXT]), np.repeat(features, 2, 0))
    status, found = answer(told, {"inputs": [str(tmp_path / "none.png")]})
    assert status == 400 and "No such file" in found["message"]
    untold = pyfunc.load_model(str(version))
    answers = [answer(untold, {"inputs": [str(tmp_path / name)]})[1]["message"] for name in ("one.png", "two.png")]
    assert answers[0] == answers[1] and 'model_config={"paths": True}' in answers[0]
