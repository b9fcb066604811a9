"""`simclr pretrain`: shards → a pretrained encoder, on Ray Train workers; the same command again goes on where it stopped."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipelines import address, cluster, storage
from pipelines.rundir import Run, open_run
from pipelines.terminal import Bar, process_age_s, say
from pipelines.tracked import Tracked
from simclr import disk
from simclr.config import Config
from simclr.data import place
from simclr.data.manifest import read_manifest

_AMPLE_BYTES = 32 << 30  # three checkpoints of the largest recipe are 19 GiB


@dataclass(frozen=True)
class Args:
    """Pretrain an encoder by a recipe; every field of the recipe is a flag."""

    data: Path
    """Directory or s3://bucket/prefix of prepared shards (`simclr prepare`); each node fetches those of S3 once."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    recipe: Annotated[str, tyro.conf.Suppress] = ""
    run: Path | None = None
    """Run directory or s3://bucket/prefix, for checkpoints too: what is there goes on, on any machine.
    Default: runs/RECIPE-DIGEST, the same for the same config and data."""
    resources: Annotated[cluster.Resources, tyro.conf.arg(name="")] = field(default_factory=cluster.Resources)
    tracking_uri: str | None = None
    """MLflow address. Default: $MLFLOW_TRACKING_URI, else a database under runs/, without a server."""


def main(args: Args) -> None:
    run = pretrain(args)
    print(storage.shown(args.run or run.path))


def pretrain(args: Args) -> Run:
    """Check everything, train, and leave a run directory with its encoder. Returns the run.

    Raises ValueError, before any worker starts, for what the user can mend.
    """
    began = stepped = time.monotonic()
    config = args.config
    groups = config.train.shard_groups
    group = 0 if groups == 1 else -1  # in groups: this machine may be too small for all of them
    data = storage.shards(args.data, groups, group)
    manifest = read_manifest(data, look=groups == 1)
    examples = manifest.examples("train", groups)
    config.images_per_rank(args.resources.workers)
    config.group_of(0, args.resources.workers)
    config.steps_per_epoch(examples)
    uri = address.tracking_address(args.tracking_uri)
    address.check(uri)
    home = storage.Home(args.run) if args.run is not None else None
    if home is not None:
        home.fetch()
        home.settle()
    remote = place.address(args.data)
    run = open_run(home.path if home else None, args.recipe, config, data, str(remote or ""))
    home = home or storage.Home(run.path)
    where, total = storage.shown(args.run or run.path), config.total_steps(examples)
    classes = len(manifest.classes)
    done = _steps_done(run, classes)
    if done >= total:
        publish_newest(run)
        home.send()
        say(f"{where} is complete: {done:,} of {total:,} steps; nothing to do")
        return run
    _require_space(run, classes)
    ours = cluster.connect(args.resources)
    from pipelines.worker import train_worker

    connected = time.monotonic()
    try:
        cluster.require(args.resources)
        run.save()
        home.send()  # before any checkpoint: run.json says whose they are
    except ValueError:
        if ours:
            cluster.disconnect()
        raise
    if done:
        say(f"going on with {where} after step {done:,} of {total:,}")
    tracked = Tracked(run, uri)
    job: dict[str, Any] = {"config": config.to_dict(), "data": str(remote or data.absolute())}
    job |= {"run": str(home.at or run.path.absolute()), "created": run.created}
    status = "FAILED"
    running = None
    try:
        running = cluster.launch(train_worker, job, args.resources, run.path / "ray")
        with Bar("pretrain", total, "steps") as bar:
            bar.resume_at(done)
            first = True
            for report in running.reports():
                if first:
                    first = False
                    tracked.open()
                    stepped = time.monotonic()
                    say(
                        f"first step {process_age_s():.0f} s after the process began: checks and Ray {connected - began:.0f} s, "
                        f"workers, their imports and the step {stepped - connected:.0f} s"
                    )
                    run.took("start", stepped - began)
                run.append(report)
                tracked.log(report)
                if report["step"] % config.train.checkpoint_every_steps == 0 and not home.busy():
                    home.later(home.send)
                rate = report["speed/images_per_s"]
                bar.update(report["step"], _note(report), rate)
        run.took("pretrain", time.monotonic() - stepped)
        home.settle()
        publish_newest(run)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        shutil.rmtree(run.path / "ray", ignore_errors=True)
        if running is not None:
            running.stop()
        if ours:
            cluster.disconnect()
        run = tracked.close(status)
        if status != "FINISHED":  # what was logged since the last checkpoint; Ctrl-C waits for it no longer than this
            sending = threading.Thread(target=_send_anyway, args=(home,), daemon=True)
            sending.start()
            sending.join(2.0 if status == "KILLED" else 60.0)
    home.wait()
    home.send()
    return run


def _send_anyway(home: storage.Home) -> None:
    try:
        home.send()
    except ValueError as error:
        say(f"not sent: {error}")


def _note(report: dict[str, Any]) -> str:
    knn = f"  kNN {100 * report['eval/knn_top1']:.1f} %" if "eval/knn_top1" in report else ""
    return f"loss {report['train/loss']:.3f}  epoch {report['epoch']:.1f}{knn}"


def _steps_done(run: Run, classes: int) -> int:
    """Steps in the newest whole checkpoint. Raises ValueError where it does not fit the config's model."""
    if not run.checkpoints.exists():
        return 0
    from simclr import checkpoint
    from simclr.model import shapes_only

    newest = checkpoint.latest(run.checkpoints, say)
    if newest is None:
        return 0
    state = checkpoint.read(newest)
    checkpoint.check(state, shapes_only(run.config, classes))
    return state.step


def _require_space(run: Run, classes: int) -> None:
    """Room for the checkpoints that will be kept and the one being written: weights and momentum, 4 bytes each."""
    existing = next(p for p in [run.path.absolute(), *run.path.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free > _AMPLE_BYTES:
        return
    from simclr.model import shapes_only  # its imports take seconds

    keep = run.config.train.keep_checkpoints
    needed = sum(p.numel() for p in shapes_only(run.config, classes).parameters()) * 8 * (keep + 1)
    disk.require_space(run.path, needed, f"for {keep} checkpoints and one being written", "use --run on another disk")


def publish_newest(run: Run) -> None:
    """Write the newest checkpoint's encoder to run/encoder."""
    from simclr import checkpoint
    from simclr.model import write_encoder

    newest = checkpoint.latest(run.checkpoints, say)
    if newest is None:
        raise ValueError(f"{run.path} has no checkpoint yet; `simclr pretrain` writes one every train.checkpoint_every_steps steps")
    state = checkpoint.read(newest)
    tensors = {name.removeprefix("model.encoder."): t for name, t in state.tensors.items() if name.startswith("model.encoder.")}
    write_encoder(tensors, run.config, run.encoder, {"recipe": run.recipe, "step": state.step, "data": run.data.name})
