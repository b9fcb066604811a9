"""`simclr cluster check`: the nodes that a cluster file would start, its mistakes, and the AWS account's quotas. Needs no cloud account."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipelines.clusterfile import rules
from pipelines.terminal import show
from pipelines.train import ray_private, tpu
from simclr import files, sense
from simclr.config import Config
from simclr.errors import UserError
from simclr.family import pretraining

_MOST_VALUES = 100_000


@dataclass(frozen=True)
class Args:
    """Check one of Ray's cluster files against its schema, the classic mistakes and the rules of safety; show the nodes it would start.
    For EC2, with credentials, it asks whether the account's quotas suffice."""

    what: Annotated[Literal["check"], tyro.conf.Positional]
    """check: read the file, start nothing."""
    file: Annotated[Path, tyro.conf.Positional]
    """The file, as cluster/aws-gpu.yaml."""
    recipe: str | None = None
    """Also check that all accelerators can share this recipe's batch."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """A file with the config, in place of --recipe: YAML as `simclr recipes RECIPE` writes it, or the run.json of a run."""
    dry_run: bool = False
    """With --recipe or --config: also say how much memory a worker needs, and whether the file's accelerators have it."""
    classes: int = 1000
    """--dry-run: labelled classes of the data; 0 = none."""
    set: tuple[str, ...] = ()
    """Fields of the recipe, as train.batch_size=1024."""


def main(args: Args) -> None:
    text, cluster = read(args.file)
    found = [*schema_mistakes(cluster)] or [*rules.mistakes(cluster)]
    name, config = asked(args)
    if (args.set or args.dry_run) and config is None:
        raise UserError(f"{'--set' if args.set else '--dry-run'} is about a recipe; name it with --recipe, or give --config FILE")
    batch = ""
    if config is not None and not found:
        try:
            batch = batch_over(cluster, config)
        except UserError as error:
            found.append(str(error))
    if found:
        rows = "\n".join(f"  {number}. {sentence}" for number, sentence in enumerate(found, 1))
        raise UserError(f"{args.file} has {len(found)} mistake{'s' if len(found) > 1 else ''}:\n{rows}")
    show(overview(cluster))
    if batch:
        show(f"\n{name}: {batch}")
    if config is not None and args.dry_run:
        for line in dry(cluster, config, args.classes):
            show(line)
    if cluster["provider"]["type"] == "aws" and (region := cluster["provider"].get("region")):
        from pipelines.clusterfile import quotas  # boto3 takes half a second

        for line in quotas.lines(rules.groups(cluster), region):
            show(f"\n{line}")
    if marked := [(number, line) for number, line in enumerate(text.splitlines(), 1) if re.search(r"# EDIT \d of \d", line)]:
        show("\nto edit before `ray up`, unless you have:")
        for number, line in marked:
            show(f"  line {number}: {re.sub(' +#', '  #', line.strip())}")
    if (Path.cwd() / "simclr/__init__.py").is_file():  # a checkout, which a job takes along
        show(f"\n{package(Path.cwd())}")


def package(folder: Path) -> str:
    """What a job takes along of `folder`, in a sentence. Raises UserError if that is more than Ray takes, or has not the code."""
    found = sorted(ray_private.packed(folder), key=lambda file: (-file[1], file[0]))
    size, most = sum(size for _, size in found), ray_private.largest_package()
    most_of_it = ", ".join(f"{name} {_mib(size)}" for name, size in found[:3])
    has = f"`ray job submit --working-dir .` sends {_mib(size)} of {folder} in {len(found):,} files"
    if size >= most:
        raise UserError(f"{has}, and Ray takes less than {_mib(most)}; the largest are {most_of_it}: name them in .rayignore")
    if missing := {"simclr/train.py", "pipelines/cli.py", "tune/sweep.py"} - {name for name, _ in found}:
        raise UserError(f"{has}, but not {min(missing)}; bring back .rayignore, and see what .gitignore names")
    return f"{has}, of {_mib(most)} that Ray takes"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """(text, content) of the file. Raises UserError if it is missing, no YAML, or no cluster file of Ray's."""
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise UserError(f"{path} is no file; cluster/ has the ones to start from")
    text = files.read_text(path, "save it as UTF-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is no YAML{where}: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a cluster file") from None
    if (size := _size(content, {})) > _MOST_VALUES:
        many = "endlessly many" if math.isinf(size) else f"{size:,.0f}"
        raise UserError(f"the aliases in {path} stand for {many} values; a cluster file has some hundred")
    if isinstance(content, dict) and "apiVersion" in content:
        raise UserError(f"{path} is a Kubernetes manifest; check it with `kubectl apply --dry-run=server -f {path}`")
    if not isinstance(content, dict) or "provider" not in content:
        raise UserError(f"{path} is no cluster file of Ray's (it has no `provider`); cluster/ has the ones to start from")
    return text, content


def _size(value: Any, known: dict[int, float]) -> float:
    """Values in `value` with its aliases written out, which may be more than could ever be read; infinite where one contains itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        known[id(value)] = 1 + sum(_size(inner, known) for inner in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def schema_mistakes(cluster: dict[str, Any]) -> list[str]:
    """The violations of the schema that Ray ships, one sentence each. With any of them the rules cannot be checked."""
    import jsonschema  # type: ignore[import-untyped]

    # Read as a file: importing Ray takes seconds.
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.submodule_search_locations
    schema = json.loads((Path(spec.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json").read_text())
    errors = sorted(jsonschema.Draft7Validator(schema).iter_errors(cluster), key=lambda error: [str(part) for part in error.path])
    found = [f"{'.'.join(map(str, error.path)) or 'the file'}: {error.message}" for error in errors]
    if not found and cluster["provider"]["type"] not in ("aws", "gcp", "local"):
        found.append(f"provider.type is {cluster['provider']['type']!r}; the rules know aws, gcp and local")
    elif not found and cluster["provider"]["type"] != "local":
        types = cluster.get("available_node_types", {})
        if cluster.get("head_node_type") not in types:
            there = ", ".join(types) or "of which there are none"
            found.append(f"head_node_type is {cluster.get('head_node_type')!r}; expected one of the node types, {there}")
    elif not found and cluster.get("available_node_types"):
        found.append("provider local takes machines as they are; leave available_node_types out")
    return found


def asked(args: Args) -> tuple[str, Config | None]:
    """(name, config) of --recipe or --config with the fields of --set; ("", None) without either."""
    if args.recipe is not None and args.config_file is not None:
        raise UserError(
            f"--recipe {args.recipe} and --config {args.config_file} each have a whole config; leave out one, --set changes fields"
        )
    if args.config_file is not None:
        from pipelines.runs import config_file

        found = config_file.read(args.config_file)
        return found.recipe, changed(found.recipe, args.set, found.config)
    if args.recipe is None:
        return "", None
    return args.recipe, changed(args.recipe, args.set)


def dry(cluster: dict[str, Any], config: Config, classes: int) -> Iterator[str]:
    """The memory of a worker against that of the file's accelerators, with the most of each kind that it starts."""
    from pipelines.train import plan

    there = [group for group in rules.groups(cluster) if group.accelerators and group.most and not group.what.startswith("TPU")]
    if not there:
        yield plan.line("memory", "no GPUs are listed in the file; a worker's memory is compared with a GPU's alone")
        return
    workers = sum(group.accelerators * group.most for group in there)
    yield from plan.shares(config, workers)
    for group in {group.what: group for group in there}.values():
        size = re.search(r"(\d+) GB", group.what)
        room = plan.Room("cuda", int(size[1]) * 10**9, f"an accelerator of {group.name}, {group.what}") if size else None
        yield from plan.memory(config, workers, classes, room, "cuda")
        if room is None:
            yield plan.line("", f"the memory of {group.machine or 'your own machines'} is not known here")


def changed(name: str, assignments: tuple[str, ...], config: Config | None = None) -> Config:
    """The recipe `name`, or the `config` of that name, with fields set, each as path=value."""
    import yaml

    from simclr.recipes import recipe

    values = (config or recipe(name)).to_dict()
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        *parents, field = path.replace("-", "_").split(".")
        inner = values
        for parent in parents:
            inner = inner.get(parent, {}) if isinstance(inner, dict) else {}
        if not equals or not isinstance(inner, dict) or field not in inner:
            raise UserError(f"--set {assignment}: expected FIELD=VALUE with a field that `simclr recipes {name}` lists")
        try:
            inner[field] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {assignment}: {value!r} is no YAML value; expected a number, a word or a list") from None
    return pretraining(values)


def batch_over(cluster: dict[str, Any], config: Config) -> str:
    """How the most and the fewest accelerators share the recipe's batch. Raises UserError if they cannot: GPUs need an image each, a TPU's
    chips as many each."""
    found = rules.groups(cluster)
    counts = sorted({sum(g.accelerators * n for g, n in zip(found, counts, strict=True)) for counts in _sizes(found)} - {0})
    if not counts:
        return f"N = {config.train.batch_size}; no accelerators are listed in the file to share it"
    said = []
    for workers in counts:
        sense.statistics_over(config, workers)
        most, fewest = config.images_per_rank(workers), config.train.batch_size // workers
        if any(g.what.startswith("TPU") for g in found):
            tpu.require_equal(config.train.batch_size, workers)
        each = f"{most} images each" if most == fewest else f"{fewest} or {most} images each"
        said.append(f"N = {config.train.batch_size} over {workers} workers, {each}")
        config.groups_of(0, workers)
    return "; ".join(said)


def _sizes(found: list[rules.Group]) -> list[list[int]]:
    return [[g.least for g in found], [g.most for g in found]]


def overview(cluster: dict[str, Any]) -> str:
    """Nodes and accelerators, as a table."""
    found = rules.groups(cluster)
    provider = cluster["provider"]
    where = ", ".join([provider["type"], *([provider["region"]] if "region" in provider else [])])
    lines = [f"cluster {cluster['cluster_name']} on {where}: would start", ""]
    rows = [("", "machine", "nodes", "accelerators")]
    for g in found:
        if g.most == 0:
            continue
        machine = (g.machine or "your own") + (", spot" if g.spot else "") + (f", {g.hosts} hosts" if g.hosts > 1 else "")
        has = f"{g.accelerators} × {g.what or 'unknown'}" if g.accelerators else "as found" if not g.machine else "–"
        if g.accelerators and g.most > 1:
            has += f", {g.accelerators * g.most} in all"
        rows.append((g.name, machine, _between(g.least, g.most), has))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, machine, nodes, has in rows:
        lines.append(f"{name:<{widths[0]}}  {machine:<{widths[1]}}  {nodes:>{widths[2]}}  {has}".rstrip())
    idle = cluster.get("idle_timeout_minutes")
    if idle and any(g.least < g.most for g in found):
        lines += ["", f"workers come when a job asks and go after {idle} idle minutes; the head stays until `ray down`"]
    return "\n".join(lines)


def _between(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} … {high}"
