"""What pretraining, fine-tuning and distilling share: a run directory, workers under Ray Train, their reports, publishing."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.runs import lease, status, sync
from pipelines.runs.directory import Run, open_run, ways_on
from pipelines.terminal import Bar, process_age_s, say
from pipelines.tracking import uri as mlflow_uri
from pipelines.tracking.outbox import Outbox, catch_up, require
from pipelines.train import own_ray, ray_private, ray_train
from pipelines.train.messages import Saved, Task
from pipelines.train.resources import Resources
from simclr import files, sense
from simclr.config import Config
from simclr.data.manifest import Manifest
from simclr.data.s3 import uri as s3_uri
from simclr.errors import UserError
from simclr.telemetry.collapse import collapse
from simclr.telemetry.straggler import SLOW

if TYPE_CHECKING:
    from pipelines.tracking.tensorboard import Scalars
    from simclr.checkpoint import State
    from simclr.methods.method import Method

_INTERRUPTED_S = 4.0  # that an interrupted job gets to end; with the command's own second (pipelines.cli) it is over within 5 s
_SENDING_S = 2.0  # of them to send its last lines to S3
_AMPLE_BYTES = 32 << 30  # three checkpoints of the largest recipe are 19 GiB


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training, checked and ready to go."""

    run: Run
    home: sync.Home
    asked: Path
    """The run directory as its user wrote it."""
    total: int
    """Optimizer steps."""
    uri: str
    """MLflow address."""
    resources: Resources
    publish: Callable[[Run, Method | None], None]
    """Writes run/encoder from the newest checkpoint, whose parts the method names; None = it is made from the run's data."""
    scalars: Scalars | None = None
    """For TensorBoard; None = not asked for."""
    given: dict[str, Any] = field(default_factory=dict)
    """Fields of the loop's `Start` that belong to this stage (see `pipelines.train.worker`)."""


def require_shares(config: Config, examples: int, resources: Resources) -> None:
    """Raise UserError unless the workers can share batches of `examples` images."""
    resources.counts(config)
    config.steps_per_epoch(examples)


def checked(run: Run, manifest: Manifest, examples: int, resources: Resources) -> Run:
    """The run with what it will do over `examples` images otherwise than its settings say, said on the terminal. Raises UserError where the
    settings of a new run do not fit the data or each other; one under way goes on as it began."""
    notes = sense.notes(run.config, manifest, examples, resources.counts(run.config), run.under_way)
    for note in notes:
        say(note)
    return replace(run, notes=notes)


def home_of(
    asked: Path | None,
    name: str,
    config: Config,
    data: Path,
    at: Path,
    tracking_uri: str | None,
    stage: str = "pretrain",
    start: dict[str, Any] | None = None,
    subset: dict[str, Any] | None = None,
    *,
    alone: contextlib.ExitStack,
) -> tuple[Run, sync.Home, str]:
    """(run, its home, MLflow address). The run directory is `asked` (default runs/NAME-DIGEST). The shards lie in `data`, which may be a
    copy of those `at` s3://… The flag or the environment gives the address. `start` and `subset` are the run's (see `Run`). Until `alone`
    is left, no other command trains the run if it is in S3; on disk `Run.alone` is for that.

    Raises UserError if another command trains the run in S3, and if no MLflow answers at the address. A run with a checkpoint, or one that
    was logged there before, goes on without MLflow.
    """
    uri = mlflow_uri.tracking_address(tracking_uri)
    home = sync.Home(asked) if asked is not None else None
    if home is not None:
        alone.enter_context(lease.alone(home))
        home.fetch()
        home.look_at_newest()
    shown = sync.shown(asked) if asked is not None else None
    run = open_run(home.path if home else None, name, config, data, str(s3_uri.address(at) or ""), stage, start, shown, subset)
    require(uri, begun=mlflow_uri.same_server(run.tracking_uri, uri) or run.under_way)
    return run, home or sync.Home(run.path), uri


def begin_with(run: Run, state: State) -> None:
    """Write run.json and the checkpoint of step 0 that all workers begin with, unless there are checkpoints."""
    from simclr import checkpoint

    run.save()
    if not run.under_way:
        checkpoint.write(run.checkpoints, state, run.config.train.keep_checkpoints)


def train(job: Job, began: float) -> Run:
    """Train from the newest checkpoint, if any, and leave a run directory with its encoder. The command began at `began`, and holds
    `Run.alone` since before it wrote anything there.

    Raises UserError, before any worker starts, for errors that the user can mend.
    """
    run, home, where = job.run, job.home, sync.shown(job.asked)
    done = _steps_done(run)
    if done >= job.total:
        home.sync_checkpoints()
        done = _steps_done(run, whole=True)
    if done >= job.total:
        job.publish(run, None)
        if job.scalars is not None:
            job.scalars.catch_up()
        if run.unlogged:
            try:
                run = catch_up(run, job.uri)
            except UserError as error:
                say(f"{error}; the same command again logs the rest")
        home.send()
        further = f"; {ways_on(where)}" if run.stage == "pretrain" else ""
        say(f"{where} is complete: {done:,} of {job.total:,} steps; nothing to do{further}")
        return run
    _require_space(run)
    ours = ray_train.connect(job.resources)
    connected = time.monotonic()
    try:
        ray_train.require(job.resources)
        run.save()
        outbox = Outbox(job.uri)
        posted = outbox.follow(run)
        status.note(run.path, "running")
        home.send()  # before any checkpoint: run.json says which run the checkpoints belong to
        if not done:
            home.sync_checkpoints()  # a first checkpoint, of step 0
    except Exception as error:
        if run.path.is_dir():
            status.note(run.path, "failed", _why(error))
        if ours:
            ray_train.disconnect()
        raise
    if done:
        say(f"going on with {where} after step {done:,} of {job.total:,}")
    ended, running, why = "FAILED", None, ""
    overdue = threading.Timer(_INTERRUPTED_S, _leave)
    overdue.daemon = True
    try:
        running = _launch(job)
        stepped, method = _follow(job, running, outbox, done, began, connected)
        run.took(run.stage, time.monotonic() - stepped)
        home.sync_checkpoints()
        job.publish(run, method)
        ended = "FINISHED"
    except KeyboardInterrupt:
        ended = "KILLED"
        status.note(run.path, "interrupted")
        overdue.start()
        raise
    except UserError as error:
        ended = "LOST" if not isinstance(error, s3_uri.Unreachable) and home.is_lost() else "FAILED"
        why = _why(error)
        raise
    except Exception as error:
        why = _why(error)
        raise
    finally:
        try:
            if ended in ("FINISHED", "FAILED"):  # a run that is lost is another driver's
                status.note(run.path, "complete" if ended == "FINISHED" else "failed", why)
            sending = threading.Thread(target=_send_anyway, args=(home,), daemon=True)
            closing = threading.Thread(target=outbox.close, args=(ended,), daemon=True)
            if ended == "KILLED":  # everything at once
                sending.start()
                closing.start()
            shutil.rmtree(run.path / "ray", ignore_errors=True)
            if running is not None:
                running.stop()
            if job.scalars is not None:
                job.scalars.close()
            if ours:
                ray_train.disconnect()
            if ended == "LOST":
                outbox.abandon()  # the MLflow run is that of the driver that has taken the run over
            elif ended == "KILLED":
                closing.join()  # the outbox knows its time
                sending.join(_SENDING_S)
            else:
                outbox.close(ended)
            if ended == "FAILED":  # send the lines since the last checkpoint
                sending.start()
                sending.join(60.0)
        finally:
            overdue.cancel()
        run = posted.run
    home.wait()
    home.send()
    return run


def _why(error: Exception) -> str:
    """The reason of a failure in a sentence."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _launch(job: Job) -> ray_train.Running:
    from pipelines.train import compile_cache
    from pipelines.train.worker import train_worker

    run = job.run
    task = Task(
        stage=run.stage,
        config=run.config,
        data=run.data_at or str(run.data.absolute()),
        run=str(job.home.at or run.path.absolute()),
        created=run.created,
        lease=job.home.ticket,
        begun=run.begun,
        given=job.given,
        compile_key=compile_cache.secret(say) if run.config.train.compile and job.home.at is None else "",
    )
    running = ray_train.launch(train_worker, task, job.resources, run.path / "ray")
    running.checks.append(job.home.check)
    return running


def _follow(job: Job, running: ray_train.Running, outbox: Outbox, done: int, began: float, connected: float) -> tuple[float, Method | None]:
    """Log the reports until there are no more; returns the time of the first, and the run's method on the meta device."""
    run, home, stepped, warned, told, slow = job.run, job.home, 0.0, None, False, ""
    method: Method | None = None
    with Bar(run.stage, job.total, "steps") as bar:
        bar.resume_at(done)
        for report in running.reports():
            if isinstance(report, Saved):
                if not told:
                    say(_cost(report, run.config.train.checkpoint_every_steps))
                told = True
                if not home.busy():
                    home.later(home.send)
                continue
            if not stepped:
                outbox.start()  # only once the workers run: its imports and tables take seconds of the same cores
                stepped = time.monotonic()
                say(
                    f"first step {process_age_s():.0f} s after the process began: checks and Ray {connected - began:.0f} s, "
                    f"workers, their imports and the step {stepped - connected:.0f} s"
                )
                run.took("start", stepped - began)
            run.append(report.line())
            if job.scalars is not None:
                job.scalars.write(report.line())
            if method is None:  # now, while the data is there: after weeks it may not be, and the encoder is to be published all the same
                method = shapes_of(run)
            if warned is None and report.step > 1 and (warned := collapse(report.metrics, method.least)):
                say(f"step {report.step:,}: {warned}; {method.least.advice}")
            if report.stragglers not in ("", slow):
                slow = report.stragglers
                say(f"step {report.step:,}: {slow} {SLOW}")
            bar.update(report.step, _note(report.metrics), report.metrics["speed/images_per_s"])
    return stepped or time.monotonic(), method


def _cost(saved: Saved, by_steps: int | None) -> str:
    """A sentence on the cost of checkpoints and on the most work that can be lost, from the first one written."""
    much = f"a checkpoint holds training up for {saved.held_s:.2g} s and is written in {saved.written_s:.2g} s"
    if by_steps is not None:
        return f"{much}; one every {by_steps:,} steps"
    share = 100 * saved.held_s / saved.every_s
    return f"{much}; one every {saved.every_s:.0f} s, {share:.2g} % of the time, is the most that is lost"


def _leave() -> None:
    """End this process, whatever it waits for. A checkpoint is whole or is not there, and metrics.jsonl has every report."""
    say("interrupted; run the same command again to go on")
    try:
        ray_private.kill_processes()
        own_ray.end()
    finally:
        os._exit(130)


def _send_anyway(home: sync.Home) -> None:
    try:
        home.send()
    except UserError as error:
        say(f"not sent: {error}")


def _note(metrics: dict[str, float]) -> str:
    shown = [
        f"{title} {100 * metrics[name]:.1f} %" for name, title in (("eval/knn_top1", "kNN"), ("eval/top1", "top-1")) if name in metrics
    ]
    return "  ".join([f"loss {metrics['train/loss']:.3f}", f"epoch {metrics['epoch']:.1f}", *shown])


def _steps_done(run: Run, whole: bool = False) -> int:
    """Steps in the newest checkpoint, after copying its reports to metrics.jsonl. Its weights are read if it has to be `whole`; else the
    workers do that, since it may have gigabytes. Raises UserError if it does not fit the config's model, and if a run that began with given
    weights has none."""
    if not run.checkpoints.exists() and not run.heads and not run.begun:
        return 0
    from simclr import checkpoint

    heads = [newest] if whole and (newest := checkpoint.latest(run.checkpoints, say)) else [] if whole else run.heads
    state = checkpoint.newest_head(heads, say)
    if state is None and run.begun:
        raise UserError(f"no checkpoint in {run.checkpoints} is whole; remove that folder, and the same command begins again")
    if state is None:
        return 0
    method = shapes_of(run)
    checkpoint.check(state, method.network, method.state)
    run.fill(state.reports)
    return state.step


def _require_space(run: Run) -> None:
    """Room for the checkpoints that will be kept and the one being written: weights and momentum, 4 bytes each."""
    existing = next(p for p in [run.path.absolute(), *run.path.absolute().parents] if p.exists())
    if shutil.disk_usage(existing).free > _AMPLE_BYTES:
        return
    keep = run.config.train.keep_checkpoints
    method = shapes_of(run)
    beside = sum(t.numel() for t in method.state.state_dict().values())
    needed = (8 * sum(p.numel() for p in method.network.parameters()) + 4 * beside) * (keep + 1)
    files.require_space(run.path, needed, f"for {keep} checkpoints and one being written", "use --run on another disk")


def shapes_of(run: Run) -> Method:
    """The run's method on the meta device: names and shapes without memory."""
    import torch

    from simclr.methods.choice import method_of
    from simclr.methods.method import Start

    return method_of(run.config, Start(run.data, torch.device("meta"), teacher=run.path / "teacher"))


def newest_tensors(run: Run, method: Method | None = None) -> tuple[int, dict[str, dict[str, Any]]]:
    """Steps of the newest checkpoint, and the weights that the run's method publishes: {"encoder": {name: tensor}, "head": …, …}."""
    from simclr import checkpoint

    newest = checkpoint.latest(run.checkpoints, say)
    if newest is None:
        raise UserError(f"{run.path} has no checkpoint yet; `simclr {run.stage}` writes one every minute")
    state, method = checkpoint.read(newest), method or shapes_of(run)
    return state.step, {name: checkpoint.part(state, method.network, module, method.state) for name, module in method.published.items()}
