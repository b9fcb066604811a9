"""The house: imports run one way, every library has one door, files stay short."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("simclr", "pipelines", "tune", "tests")
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))

# Library → the files that may import it.
DOORS = {
    "boto3": {"simclr/data/s3/store.py"},
    "botocore": {"simclr/data/s3/store.py"},
    "mlflow": {"pipelines/tracking/client.py", "pipelines/tracking/registry.py"},
    # The writer, the reader and its operation, the room that makes FFCV's import fast and harmless, and, for the bench
    # alone, FFCV's own decoders in FFCV's own loader.
    "ffcv": {f"simclr/data/{name}.py" for name in ("beton", "loader", "decode", "ffcv_import", "ffcv_crops")},
    "ray": {f"pipelines/{name}.py" for name in ("capacity", "cluster", "controller", "gauges", "inbox", "notice", "tpu", "worker")}
    | {"tune/ray_tune.py", "tune/trial.py"},
    "torchvision": {"simclr/data/sources/open.py", "simclr/data/tasks.py", "simclr/encoder/export.py"},  # the last for its networks alone
    "tensorflow": {"simclr/encoder/tf_checkpoint.py"},
    "onnxruntime": {"simclr/encoder/export.py"},
    "yaml": {"pipelines/commands/cluster.py"},
    "jsonschema": {"pipelines/commands/cluster.py"},
}
# Module of ours → the modules of ours that it may import.
WITHIN = {
    "simclr.config": set(),
    "simclr.telemetry.device_time": set(),
    "simclr.collectives": {"simclr.telemetry.device_time"},
    "simclr.telemetry.straggler": set(),
    "simclr.keyed": set(),
    "simclr.telemetry.progress": set(),
    "simclr.loss": {"simclr.collectives", "simclr.kernels.nt_xent"},
    "simclr.kernels.nt_xent": {"simclr.kernels.nt_xent_triton"},
    "simclr.evaluation.representation": {"simclr.collectives"},
    "simclr.optim": {"simclr.config"},
    "simclr.networks.batchnorm": {"simclr.collectives"},
    "simclr.networks.initial": {"simclr.keyed"},
    "simclr.networks.resnet": {"simclr.networks.batchnorm", "simclr.config", "simclr.networks.initial"},
    "simclr.methods.queue": {"simclr.collectives"},
    "simclr.networks.heads": {
        "simclr.networks.batchnorm",
        "simclr.config",
        "simclr.networks.initial",
        "simclr.methods.queue",
        "simclr.networks.resnet",
        "simclr",
    },
    "simclr.stages": {"simclr.config"},
    "simclr.data.labels": {"simclr", "simclr.files", "simclr.keyed"},
    "simclr.checkpoint": set(),
    "simclr.encoder.tf_checkpoint": set(),
    "simclr.encoder.convert": {
        "simclr",
        "simclr.networks.batchnorm",
        "simclr.encoder.tf_checkpoint",
        "simclr.config",
        "simclr.networks.initial",
        "simclr.networks.heads",
        "simclr.networks.resnet",
    },
    "simclr.data.s3.uri": set(),
    "simclr.data.s3.store": {"simclr.data.s3.uri"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules that `path` imports, anywhere in it; `from a import b` is a.b where that is a module of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return found


def test_imports_run_one_way() -> None:
    for path in FILES:
        room = ROOMS.index(path.relative_to(ROOT).parts[0])
        above = {name for name in imports(path) if name.split(".")[0] in ROOMS[room + 1 :]}
        assert not above, f"{path.relative_to(ROOT)} imports {above}"
        assert not any(name.split(".")[0] == "cluster" for name in imports(path))


def test_the_command_line_reaches_the_room_above_by_name_alone() -> None:
    """`simclr sweep` is found when it is called, in one table; nothing else in a room names a module of one above."""
    from pipelines.cli import _ABOVE, COMMANDS

    assert set(_ABOVE) <= set(COMMANDS) and all(name in MODULES for name in _ABOVE.values())
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("simclr", "pipelines"):
            named = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            found = {text for text in named if text in MODULES and text.startswith(("tune.", "tests."))}
            assert found == (set(_ABOVE.values()) if path.name == "cli.py" else set()), path


@pytest.mark.parametrize("module", sorted(WITHIN))
def test_the_method_is_layered(module: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    ours = {name for name in imports(path) if name.split(".")[0] == "simclr"}
    assert ours <= WITHIN[module]


def test_each_library_has_its_door() -> None:
    found = defaultdict(set)
    for path in FILES:
        if path.is_relative_to(ROOT / "tests"):
            continue
        for name in imports(path):
            found[name.split(".")[0]].add(str(path.relative_to(ROOT)))
    for library, doors in DOORS.items():
        assert found[library] <= doors, f"{library} is imported in {found[library] - doors}"


def test_the_method_knows_no_framework_around_it() -> None:
    for path in (ROOT / "simclr").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"ray", "mlflow", "tyro", "argparse", "rich"}, path
        assert "sys.argv" not in path.read_text(), path


def test_files_stay_short() -> None:
    budget = {ROOT / "simclr/train.py": 250, ROOT / "pipelines/train/worker.py": 90}
    for path in FILES:
        lines = len(path.read_text().splitlines())
        assert lines <= budget.get(path, 400), f"{path.relative_to(ROOT)} has {lines} lines"


def test_nothing_is_called_utils_and_nothing_is_left_to_do() -> None:
    for path in FILES:
        assert path.stem not in ("utils", "util", "helpers", "common"), path
        if path != Path(__file__):
            assert not {"TODO", "FIXME", "XXX"} & set(path.read_text().replace(":", " ").split()), path
