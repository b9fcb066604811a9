"""A sweep that goes on: what its schedulers, its plan and its trials' records bring back."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.runs.directory import load_run
from simclr import checkpoint
from simclr.data.manifest import read_manifest
from simclr.errors import Diverged, UserError
from tests.support.sweeps import a_sweep, trained
from tune import plan, resolve, spaces, trial, validate
from tune.sweep_dir import Sweep, Trial

BATCH = {"train.batch_size": 60}
NAMES = tuple("abcdefghi")
TOTAL, EVERY, SAVED = 120, 5, 20  # steps: of a trial, between its reports, between its checkpoints


class Rule:
    """asha or median over trials that this class trains: each reports every 5 steps, in a random order over the trials."""

    def __init__(self, name: str, sweep: Sweep, over: dict[str, int], seed: int = 0, names: tuple[str, ...] = ()) -> None:
        pytest.importorskip("ray.tune")
        sweep.path.mkdir(exist_ok=True)
        from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

        from tune.schedulers import Remembering

        about: dict[str, Any] = {"time_attr": "step", "metric": sweep.metric, "mode": "max", "grace_period": TOTAL // 4}
        rule = ASHAScheduler(**about, max_t=100 * TOTAL, reduction_factor=3) if name == "asha" else MedianStoppingRule(**about)
        self.sweep, self.over, self.seed = sweep, over, seed
        self.scheduler = Remembering(rule, sweep, "step", {*NAMES, *over, *names}, set(over))
        for each in NAMES:
            self.scheduler.on_trial_add(Waiting(), each)

    def report(self, name: str, step: int) -> None:
        """`name` reports; if it is told to stop, or has come to its end, it is over."""
        score = random.Random(f"{self.seed} {name} {step}").random() * 0.4 + NAMES.index(name) / 20
        decision = self.scheduler.on_trial_result(Waiting(), name, {"step": step, self.sweep.metric: score})
        if decision == "STOP" or step == TOTAL:
            self.over[name] = step
            self.scheduler.on_trial_complete(Waiting(), name, {})


class Waiting:
    def get_live_trials(self) -> list[Any]:
        return []


def order(seed: int) -> list[tuple[str, int]]:
    """All reports of the trials: each trial's in order of its steps, the trials' in one another's midst."""
    draw, at = random.Random(seed), dict.fromkeys(NAMES, 0)
    found = []
    while running := [name for name in NAMES if at[name] < TOTAL]:
        name = draw.choice(running)
        at[name] += EVERY
        found.append((name, at[name]))
    return found


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_rule_decides_as_if_the_sweep_had_not_stopped(tmp_path: Path, name: str) -> None:
    """Killed at random points, also between a decision and its record; the trials then repeat the reports since their checkpoints."""
    stopped = 0
    for seed in range(10):
        whole, broken = (Rule(name, a_sweep(tmp_path / f"{folder} {seed}", "smoke"), {}, seed) for folder in ("whole", "broken"))
        for each, step in order(seed):
            if each not in whole.over:
                whole.report(each, step)
        stopped += sum(step < TOTAL for step in whole.over.values())
        at, kills = dict.fromkeys(NAMES, 0), set(random.Random(seed).sample(range(len(order(seed))), 12))
        for number, (each, step) in enumerate(order(seed)):
            if number in kills:
                lost = dict(list(broken.over.items())[-1:])  # the record of the last trial's end was not written
                broken = Rule(name, broken.sweep, {n: s for n, s in broken.over.items() if n not in lost}, seed)
                assert broken.scheduler.ended >= {n for n, s in lost.items() if s < TOTAL}
                broken.over |= lost
                for again in (n for n in NAMES if n not in broken.over):
                    for repeated in range(at[again] // SAVED * SAVED + EVERY, at[again] + 1, EVERY):
                        broken.report(again, repeated)
            if each not in broken.over:
                broken.report(each, step)
                at[each] = step
        assert broken.over == whole.over
    assert 10 <= stopped <= 80


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_sweep_of_an_earlier_version_is_heard_from_its_runs(tmp_path: Path, name: str) -> None:
    """It has no reports.jsonl: the order and the scores are in the runs' metrics.jsonl."""
    sweep = a_sweep(tmp_path / "s", "smoke", changes=BATCH)
    found = trained(sweep, lambda point: 0.5)
    for number, record in enumerate(found[:4]):
        folder = sweep.path / "trials" / record.name
        over = number < 2
        record = dataclasses.replace(record, status="finished" if over else "running", step=60)
        record.save(folder)
        rows = [{"time": 100.0 * step + number, "step": step, "train/loss": 1.0} for step in (10, 30, 60)]
        for row in rows[1:2]:
            row["eval/knn_top1"] = 0.25 * number
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for record in found[4:]:
        (sweep.path / "trials" / record.name / "trial.json").unlink()
    names = tuple(record.name for record in found[:4])
    Rule(name, sweep, dict.fromkeys(names[:2], 60), names=names)
    lines = [json.loads(line) for line in (sweep.path / "reports.jsonl").read_text().splitlines()]
    a, b, c, d = names
    told = [(line["trial"], line.get("time", "over")) for line in lines]
    assert told == [(a, 30), (b, 30), (c, 30), (d, 30), (a, 60), (a, "over"), (b, 60), (b, "over"), (c, 60), (d, 60)]
    assert [line["score"] for line in lines if line.get("time") == 60] == [0, 0.25, 0.5, 0.75]
    again = (sweep.path / "reports.jsonl").read_text()
    (sweep.path / "reports.jsonl").write_text(again + '{"trial": "x", "ti')  # a machine crashed while it wrote
    Rule(name, sweep, {}, names=names)
    assert (sweep.path / "reports.jsonl").read_text() == again
    (sweep.path / "reports.jsonl").write_text('{"trial": "x", "time": "soon", "score": 1}\n' + again)
    with pytest.raises(UserError, match=r"line 1, is damaged: time is 'soon', expected float; remove .*reports.jsonl"):
        Rule(name, sweep, {})


def test_reports_of_other_trials_and_of_no_size_are_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A stranger's lines of trials that this sweep does not have would stop those that it has."""
    rule, lines = Rule("asha", sweep := a_sweep(tmp_path / "s", "smoke"), {}), sweep.path / "reports.jsonl"
    for step in (30, 60):
        rule.report("a", step)
    text = lines.read_text()
    lines.write_text(text + "".join(json.dumps({"trial": f"x{i}", "time": 30, "score": 1e6}) + "\n" for i in range(9)))
    again = Rule("asha", sweep, {})
    assert lines.read_text() == text and again.scheduler.heard == {"a": 60}
    assert "has reports of trials that this sweep does not have, 9, as 'x0'" in capsys.readouterr().err
    monkeypatch.setattr("simclr.files.MOST_JSON_BYTES", len(text) - 1)
    with pytest.raises(UserError, match=r"reports.jsonl is damaged: it has \d+ bytes, expected .* remove .*reports.jsonl"):
        Rule("asha", sweep, {})


class Controller:
    """An experiment of Ray Tune's, as far as pbt asks."""

    def __init__(self, trials: list[Any]) -> None:
        self.trials, self.search_alg, self.paused = trials, None, list[str]()

    def get_trials(self) -> list[Any]:
        return self.trials

    def pause_trial(self, trial: Any, should_checkpoint: bool) -> None:
        self.paused.append(str(trial))

    def _schedule_trial_save(self, trial: Any, result: Any) -> Any:
        return f"the checkpoint of {trial}"


def population(sweep: Sweep) -> tuple[Any, Controller]:
    """pbt and its four members, which have not reported yet."""
    from ray.tune.experiment import Trial as Tuned

    from tune.schedulers import Population

    mutations = {"trial": {"axes": {"loss.temperature": [0, 1, 2, 3]}}}
    made = Population(sweep, time_attr="step", perturbation_interval=10, hyperparam_mutations=mutations, log_config=False)
    assert made.set_search_properties(sweep.metric, "max")
    config = {"trial": {"axes": {"loss.temperature": 0}, "seed": 0}}
    members = [Tuned("pbt", stub=True, trial_name_creator=lambda _, n=n: n, config=config) for n in ("a", "b", "c", "d")]
    home = Controller(members)
    for member in members:
        member.status = "RUNNING"
        made.on_trial_add(home, member)
    return made, home


def test_pbt_goes_on_with_the_scores_and_times_of_its_members(tmp_path: Path) -> None:
    """It fails when Ray changes the private state that it sets."""
    pytest.importorskip("ray.tune")
    sweep = a_sweep(tmp_path / "s", "smoke", scheduler="pbt")
    sweep.save()
    made, home = population(sweep)

    def reports(to: Any, at: Controller, step: int, *numbers: int) -> None:
        for number in numbers:
            to.on_trial_result(at, at.trials[number], {"step": step, sweep.metric: number / 10, "training_iteration": 1})

    reports(made, home, 10, 3, 2, 1)  # d, c, b: then the sweep is killed, and the member a has not reported
    there = json.loads((sweep.path / "population.json").read_text())
    assert there == {n: {"score": s, "scored": 10, "changed": 10} for n, s in (("b", 0.1), ("c", 0.2), ("d", 0.3))}
    home.paused.clear()
    again, resumed = population(sweep)
    lower, upper = again._quantiles()
    assert [str(t) for t in lower] == ["b"] and [str(t) for t in upper] == ["d"]
    reports(again, resumed, 15, 1, 2, 3)  # they repeat steps, and their time has not come
    assert json.loads((sweep.path / "population.json").read_text()) == there and not resumed.paused
    reports(again, resumed, 20, 3, 1)  # it has: d has a checkpoint, which b takes
    assert resumed.paused == ["b"]
    (sweep.path / "population.json").write_text('{"b": {"score": "high", "scored": 10, "changed": 10}}')
    with pytest.raises(UserError, match=r"b is {'score': 'high'.*expected dict"):
        population(sweep)


@pytest.mark.parametrize("name", spaces.SPACES)
def test_codes_are_found_again_in_a_config(tmp_path: Path, name: str) -> None:
    sweep = a_sweep(tmp_path, name, search="random", trials=4)
    for number, combination in enumerate(resolve.samples(sweep.restricted, 4, 3)):
        config = resolve.point(sweep.restricted, sweep.base, combination, number).config
        codes = resolve.codes_of(sweep.restricted, sweep.base, config)
        assert codes is not None
        back = {axis.key: resolve.chosen(axis, codes[axis.key]) for axis in sweep.restricted.axes}
        assert resolve.point(sweep.restricted, sweep.base, back, number).config == config
    if name == "smoke":
        assert resolve.codes_of(sweep.restricted, sweep.base, resolve.changed(sweep.base, {"loss.temperature": 7.0})) is None


def member(sweep: Sweep, name: str, **values: Any) -> Trial:
    """A trial of `sweep` that was killed, with other values than it began with."""
    folder = sweep.path / "trials" / name
    run = load_run(folder)
    config = resolve.changed(run.config, values)
    dataclasses.replace(run, config=config).save()
    record = Trial(name=name, values={"loss.temperature": config.loss.temperature, "optim.base_lr": config.optim.base_lr}, seed=config.seed)
    record.save(folder)
    return record


def test_the_trials_that_are_left(tmp_path: Path, patterns: Path) -> None:
    manifest = read_manifest(patterns)
    sweep = a_sweep(tmp_path / "s", "smoke", changes=BATCH, scheduler="pbt")
    names = [trial.name for trial in trained(sweep, lambda point: 0.5)]
    codes = plan.settled(sweep, validate.check(sweep, manifest))
    assert [code.name for code in codes] == names and plan.left(sweep, codes) == []
    (sweep.path / "trials" / names[3] / "trial.json").unlink()  # it had not begun
    member(sweep, names[0], **{"loss.temperature": 1.0, "seed": 4})  # pbt changed it; its weights are of the trial with this seed
    first, second = plan.left(sweep, codes)
    assert (first.name, first.axes["loss.temperature"], first.seed) == (names[0], 3, 4 - sweep.base.seed) and second == codes[3]
    assert plan.left(dataclasses.replace(sweep, scheduler="none"), codes) == [codes[0], codes[3]]
    # What the first start drew stays, whatever a later version would draw.
    assert plan.settled(sweep, list(reversed(codes))) == codes


def test_optuna_goes_on_from_scores_and_unfinished_trials(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from tune import ray_tune

    sweep = a_sweep(tmp_path / "s", "search", search="random", trials=12, changes=BATCH)
    found = trained(sweep, lambda point: point.config.loss.temperature)
    sweep = dataclasses.replace(sweep, search="optuna", trials=16)
    member(sweep, found[0].name)
    dataclasses.replace(found[1], status="failed", reason="not finite", scores={}).save(sweep.path / "trials" / found[1].name)
    left = plan.left(sweep, [])
    assert [code.name for code in left] == [found[0].name]
    study = ray_tune._search(sweep, left)._ot_study
    states = [each.state.name for each in study.trials]
    assert states.count("COMPLETE") == 10 and states.count("PRUNED") == 1 and states.count("WAITING") == 1
    best = max(found[2:], key=lambda record: record.scores[sweep.metric])
    assert study.best_value == best.scores[sweep.metric]
    assert study.best_params["trial/axes/loss.temperature"] == best.values["loss.temperature"]
    search = ray_tune._search(sweep, left)
    assert search.suggest("1")["trial"]["axes"] == left[0].axes
    assert search.suggest("2")["trial"]["axes"] not in [axes for axes, _ in plan.scored(sweep)]


def test_a_name_is_of_one_trial(tmp_path: Path) -> None:
    """Two trials of one name would train in one directory. A search may draw the codes of an unfinished trial again, or twice."""
    pytest.importorskip("ray.tune")
    from ray.tune.experiment import Trial as Tuned

    from tune import ray_tune

    def drawn(temperature: int, **more: Any) -> str:
        config = {"trial": {"axes": {"loss.temperature": temperature, "optim.base_lr": 0.5}, "seed": 0, **more}}
        made = Tuned("sweep", stub=True, config=config, trial_name_creator=name, trial_dirname_creator=name)
        assert str(made) == made.custom_dirname == name(made)
        return str(made)

    left = [resolve.Coded(axes={"loss.temperature": t, "optim.base_lr": 0.5}, seed=0, name=n) for n, t in (("a", 1), ("b", 2), ("c", 1))]
    name = ray_tune._naming(left)
    assert [drawn(1), drawn(2), drawn(1)] == ["a", "b", "c"]
    others = [drawn(1), drawn(1), drawn(2), drawn(3)]
    assert len({*others, "a", "b", "c"}) == 7
    assert drawn(1, name="012-s0") == "012-s0"


def test_a_trial_that_goes_on_reports_its_last_score_until_there_is_a_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it did before: else a scheduler would decide at a later step. Another seed, and another trial's weights, have no score yet."""
    tune = pytest.importorskip("ray.tune")
    monkeypatch.setattr(tune, "get_context", lambda: SimpleNamespace(get_trial_name=lambda: "000-s0"))
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    sent = SimpleNamespace(actor=SimpleNamespace(put=SimpleNamespace(remote=lambda message: None)))
    began: list[Trial] = []

    def fails_first(sweep: Any, run: Any, record: Trial, *_: Any) -> Trial:
        began.append(record)
        if len(began) == 1:
            raise Diverged("not finite at step 9 on rank 0")
        return record

    sweep = a_sweep(tmp_path / "s", "smoke", changes=BATCH)
    record = trained(sweep, lambda point: 0.5)[0]
    folder = sweep.path / "trials" / record.name
    dataclasses.replace(record, status="running", scores={"eval/knn_top1": 0.25}, donor="001-s0").save(folder)
    monkeypatch.setattr(trial, "_open", lambda sweep, directory, config, donor: load_run(folder))
    monkeypatch.setattr(trial, "_set_aside", lambda *_: None)
    monkeypatch.setattr(trial, "_train", fails_first)
    asked = resolve.Coded(axes={"loss.temperature": 0, "optim.base_lr": 0}, seed=0)
    trial.drive(asked, sweep, sent, True, {})
    assert [(t.scores, t.seed, t.donor) for t in began] == [
        ({"eval/knn_top1": 0.25}, record.seed, "001-s0"),
        ({}, record.seed + 1000, ""),
    ]
    began.clear()
    record.save(folder)
    dataclasses.replace(record, status="running").save(folder)
    monkeypatch.setattr(trial, "_donor", lambda note, name: "002-s0")
    trial.drive(asked, sweep, sent, True, {})
    assert (began[0].scores, began[0].donor) == ({}, "002-s0")


def test_what_a_killed_driver_has_not_heard_is_told_by_the_trial_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers went on for some seconds, and their reports came back with the checkpoint."""
    tune, told, read = pytest.importorskip("ray.tune"), list[dict[str, Any]](), list[str]()
    monkeypatch.setattr(tune, "report", told.append)
    sweep = a_sweep(tmp_path / "s", "smoke", changes=BATCH, scheduler="asha")
    record = trained(sweep, lambda point: 0.5)[0]
    run = load_run(sweep.path / "trials" / record.name)
    for step in range(1, 11):
        run.append({"step": step, "train/loss": 1.0} | ({"eval/knn_top1": step / 100} if step in (2, 6, 10) else {}))
    checkpoint.write(run.checkpoints, checkpoint.State(8, run.config.to_dict(), {}), 1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "about", lambda path, real=checkpoint.about: read.append(path.name) or real(path))
        found = trial._caught_up(sweep, run, record, trial._newest(sweep, run), 0)
    assert read == ["step-000000008"]  # once: it may have gigabytes
    assert [(line["step"], line["images"], line["eval/knn_top1"]) for line in told] == [
        (step, 60 * step, 0.02 if step < 6 else 0.06) for step in range(2, 9)
    ]
    assert found.scores == record.scores | {"eval/knn_top1": 0.06}
    told.clear()
    assert trial._caught_up(sweep, run, record, 8, 6) == found and [line["step"] for line in told] == [7, 8]  # the others were heard
    told.clear()
    assert trial._caught_up(dataclasses.replace(sweep, scheduler="pbt"), run, record, 8, 0) == found and not told
