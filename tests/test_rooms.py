"""The house: imports run one way, no file imports in a circle, every library has one door, files stay short."""

from __future__ import annotations

import ast
import functools
import itertools
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FILES = sorted(p for room in ("simclr", "pipelines", "tune", "tests") for p in (ROOT / room).rglob("*.py"))

# Rooms from left to right, as ARCHITECTURE.md has them: each imports what stands behind it, and itself. A name may be a folder or a
# file; the longest that fits counts. `pipelines.pyfunc` and `pipelines.notice` are shims for what was written before.
LAYERS = [
    ("tests",),
    ("tune",),
    ("pipelines.cli",),
    ("pipelines.commands",),
    ("pipelines.evaluation", "pipelines.bench"),
    ("pipelines.train", "pipelines.parts"),
    ("pipelines.tracking", "pipelines.pyfunc"),
    ("pipelines.runs",),
    ("pipelines.tracking.uri", "pipelines.tracking.server", "pipelines.html", "pipelines.clusterfile", "pipelines.notice"),
    ("pipelines.environ",),
    ("pipelines.terminal", "pipelines.allocator", "pipelines.train.ray_private"),
    ("pipelines",),
    ("simclr.train", "simclr.footprint"),
    ("simclr.methods",),
    ("simclr.gradient_cache", "simclr.telemetry"),
    ("simclr.evaluation", "simclr.sense"),
    ("simclr.encoder",),
    ("simclr.data",),
    ("simclr.networks", "simclr.views", "simclr.loss", "simclr.optim", "simclr.checkpoint", "simclr.stages", "simclr.recipes"),
    ("simclr.recipes_pairs", "simclr.recipes_predictive", "simclr.recipes_siblings", "simclr.recipes_simclr"),
    ("simclr.family",),
    ("simclr.collectives", "simclr.config", "simclr.precision"),
    ("simclr.sections",),
    (
        "simclr.keyed",
        "simclr.papers",
        "simclr.shares",
        "simclr.compiling",
        "simclr.cores",
        "simclr.processes",
        "simclr.kernels",
        "simclr.telemetry.device_time",
        "simclr.telemetry.progress",
        "simclr.to_device",
        "simclr.files",
        "simclr.fields",
        "simclr.proxy",
        "simclr.text",
    ),
    ("simclr.errors", "simclr.extras"),
]
# `simclr` itself lends `load_encoder` and is imported when that is called.
PLACE = {name: place for place, names in enumerate(LAYERS) for name in names} | {"simclr": len(LAYERS)}

# Library → the files that may import it.
DOORS = {
    # The last asks for an account's quotas, not for S3.
    "boto3": {"simclr/data/s3/access.py", "pipelines/clusterfile/quotas.py"},
    "botocore": {"simclr/data/s3/access.py", "simclr/data/s3/answers.py", "simclr/data/s3/store.py", "pipelines/clusterfile/quotas.py"},
    # The loader of a version answers MLflow's server with an error of MLflow's.
    "mlflow": {f"pipelines/tracking/{name}.py" for name in ("client", "evaluated", "flavor", "pyfunc", "registry", "server")},
    # The loader composes what FFCV compiles; the rest of FFCV lies in one room.
    "ffcv": {f"simclr/data/ffcv/{name}.py" for name in ("writer", "reader", "decode", "imports", "baseline")} | {"simclr/data/loader.py"},
    "ray": {
        *(f"pipelines/train/{n}.py" for n in ("capacity", "elastic", "messages", "overseer", "prometheus")),
        *(f"pipelines/train/{n}.py" for n in ("ray_private", "ray_start", "ray_train", "retry", "starting", "tpu", "waiting", "worker")),
        "pipelines/clusterfile/preemption.py",
        "pipelines/parts/run.py",
        "tune/ray_tune.py",
        "tune/schedulers.py",
        "tune/trial.py",
    },
    "pyarrow": {"simclr/data/sources/parquet.py", "simclr/data/feature_parts.py", "simclr/data/note.py"},
    # The last for its networks alone.
    "torchvision": {"simclr/data/sources/torchvision.py", "simclr/data/tasks.py", "simclr/encoder/export.py"},
    "cv2": {"simclr/data/raster.py"},
    "tifffile": {"simclr/data/raster.py"},
    "timm": {"simclr/networks/timm.py"},
    "pillow_heif": {"simclr/data/pixels.py"},
    "tensorflow": {"simclr/encoder/tf_checkpoint.py"},
    "onnxruntime": {"simclr/encoder/export.py"},
    "onnx": {"simclr/encoder/onnx_graph.py"},
    "huggingface_hub": {"pipelines/tracking/hub.py", "simclr/encoder/hub.py"},
    "yaml": {"pipelines/commands/cluster.py", "pipelines/runs/config_file.py", "tune/words.py"},
    "jsonschema": {"pipelines/commands/cluster.py"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


@functools.cache
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


def place(module: str) -> int:
    parts = module.split(".")
    return next(PLACE[room] for n in range(len(parts), 0, -1) if (room := ".".join(parts[:n])) in PLACE)


def test_imports_run_one_way() -> None:
    """`pipelines.pyfunc`, which old models name, is a door into a room to its left; nothing else is."""
    wrong = [
        f"{name_of(path)} imports {other}, which stands to its left"
        for path in FILES
        for other in imports(path) & MODULES
        if place(other) < place(name_of(path)) and name_of(path) not in ("pipelines.pyfunc", "simclr")
    ]
    assert not wrong, "\n".join(wrong)
    assert not [path for path in FILES if any(name.split(".")[0] == "cluster" for name in imports(path))]


def test_no_file_imports_in_a_circle() -> None:
    edges = {name_of(path): imports(path) & MODULES for path in FILES}
    state: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"a circle: {' → '.join((*way[way.index(module) :], module))}"
        if module in state:
            return
        state[module] = 1
        for other in sorted(edges[module] - {module}):
            visit(other, (*way, module))
        state[module] = 2

    for module in edges:
        visit(module, ())


def test_every_file_is_in_a_room_of_the_map() -> None:
    """A new file at the top of a package is a new room: it gets its place in LAYERS, and its line in ARCHITECTURE.md."""
    rooms = {".".join(name.split(".")[:2]) for name in MODULES if name.count(".") and name.split(".")[0] in ("simclr", "pipelines")}
    assert rooms - {".".join(name.split(".")[:2]) for name in PLACE} == set()


def test_the_command_line_reaches_the_room_above_by_name_alone() -> None:
    """`simclr sweep` is found when it is called, in one table; nothing else in a room names a module of one above."""
    from pipelines.cli import _ABOVE, COMMANDS

    assert set(_ABOVE) <= set(COMMANDS) and all(name in MODULES for name in _ABOVE.values())
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("simclr", "pipelines"):
            named = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            found = {text for text in named if text in MODULES and text.startswith(("tune.", "tests."))}
            assert found == (set(_ABOVE.values()) if path.name == "cli.py" else set()), path


def test_each_library_has_its_door() -> None:
    found = defaultdict(set)
    for path in FILES:
        if path.is_relative_to(ROOT / "tests"):
            continue
        for name in imports(path):
            found[name.split(".")[0]].add(str(path.relative_to(ROOT)))
    for library, doors in DOORS.items():
        assert found[library] == doors, f"{library} is imported in {found[library] ^ doors}, which the map has otherwise"


def test_the_method_knows_no_framework_around_it() -> None:
    for path in (ROOT / "simclr").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"ray", "mlflow", "tyro", "argparse", "rich"}, path
        assert "sys.argv" not in path.read_text(), path


@pytest.mark.parametrize(("name", "most"), [("simclr/train.py", 200), ("pipelines/train/worker.py", 90)])
def test_what_is_read_first_stays_short(name: str, most: int) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= most


def test_files_stay_short() -> None:
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long, long


def test_nothing_is_called_utils_and_nothing_is_left_to_do() -> None:
    for path, word in itertools.product(FILES, ("utils", "util", "helpers", "common")):
        assert path.stem != word, path
    for path in FILES:
        if path != Path(__file__):
            assert not {"TODO", "FIXME", "XXX"} & set(path.read_text().replace(":", " ").split()), path
