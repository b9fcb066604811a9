"""`pip install .` alone: what works with it, and what every other command says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from simclr import extras
from simclr.data.sources.open import open_source
from tests.support.paths import ROOT
from tests.support.small_install import distributions

# Words → what the sentence says is missing. Each command that needs an extra, at the library that it reaches first.
NEEDS = {
    "demo": "FFCV",
    "prepare --source photos --out shards": "FFCV",
    "pull photos@champion --to pulled": "MLflow",
    "evaluate photos@champion --data photos": "MLflow",
    "embed encoder photos --out spread --workers 2": "Ray",
    "embed encoder s3://bucket/photos --out remote": "boto3",
    "curate features --near-duplicates 0.9": "SciPy",
    "cluster check nodes.yaml": "PyYAML",
    "sweep temperature --help": "boto3",
}


@pytest.fixture(scope="module")
def small(published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Words → exit code, output, errors, one after the other in one process and one folder."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "encoder").symlink_to(published)
    (folder / "nodes.yaml").touch()
    for number, item in enumerate(open_source("patterns:train=24,test=8,size=32").items()):
        path = folder / "photos" / item.split / str(item.label)
        path.mkdir(parents=True, exist_ok=True)
        from PIL import Image

        assert isinstance(item.data, np.ndarray)
        Image.fromarray(item.data).save(path / f"{number}.jpg")
    works = [
        "--help",
        "pretrain --help",
        "embed encoder photos --out features",
        "embed encoder photos/test --out one.npz",
        "evaluate --features features",
        "evaluate encoder --data photos --k 3 --protocol knn --out scores",
        "neighbours features photos/test --encoder encoder --k 2",
        "export encoder --to encoder.pt2",
    ]
    asked = [sys.executable, "-m", "tests.support.small_install", *works, *NEEDS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SIMCLR_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(asked, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["words"] for row in told] == [*works, *NEEDS]
    return {row["words"]: (row["code"], row["out"], row["err"]) for row in told}


def test_an_encoder_is_used_with_the_small_install(small: dict[str, tuple[int, str, str]]) -> None:
    works = {words: told for words, told in small.items() if words not in NEEDS}
    assert not {words: told for words, told in works.items() if told[0] != 0}
    assert works["embed encoder photos --out features"][1].startswith("features: 32 × ")
    assert "Pillow decoded JPEGs" in works["embed encoder photos --out features"][2]
    _, out, err = works["evaluate encoder --data photos --k 3 --protocol knn --out scores"]
    assert "is no directory of shards" in err and re.search(r"24 training and 8 test images\n  top-1 \d", out), out


@pytest.mark.parametrize("words", NEEDS)
def test_what_needs_more_says_so_in_one_sentence(small: dict[str, tuple[int, str, str]], words: str) -> None:
    code, out, err = small[words]
    sentence = f"simclr: `simclr {words.split()[0]}` needs {NEEDS[words]}, which is not installed here: pip install 'simclr-cluster[train]'"
    assert (code, out, err.splitlines()[-1]) == (2, "", sentence) and "Traceback" not in err


def test_the_table_of_extras_is_that_of_the_project() -> None:
    """Each library of a row is reached by its extra, and none of them by the small install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == extras.DISTRIBUTION
    assert set(extras._EXTRAS) <= set(project["optional-dependencies"])
    modules = {module for libraries in extras._EXTRAS.values() for module in libraries}
    assert {"ray", "mlflow", "ffcv", "numba", "boto3", "onnxruntime"} <= modules
    assert not modules & distributions() and {"torch", "torchvision", "numpy", "pillow", "safetensors", "tyro", "rich"} <= distributions()
    (every,) = project["optional-dependencies"]["all"]
    assert re.fullmatch(rf"{extras.DISTRIBUTION}\[(.+)\]", every)
