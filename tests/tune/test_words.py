"""Spaces of a user's own: what words mean, what is refused, and sweeps of them that go on."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli
from pipelines.commands import pretrain
from simclr.config import SimCLR
from simclr.data.manifest import read_manifest
from simclr.errors import UserError
from simclr.recipes import recipe
from tests.support.command import Run, refused
from tests.support.sweeps import a_sweep, trained
from tune import plan, report, resolve, spaces, sweep, sweep_dir, validate, words
from tune.spaces import Between, Peak, PeakBetween, Times, WholeBetween
from tune.trial import _flag, _open

TINY = recipe("patterns_tiny")
VALUES: list[tuple[str, Any, Any]] = [
    ("head.layers", "2,3", (2, 3)),
    ("head.layers", [2, 3], (2, 3)),
    ("head.layers", 3, (3,)),
    ("head.layers", "2,2, 3", (2, 3)),
    ("optim.base_lr", "1,0.5,1e-3", (1.0, 0.5, 0.001)),
    ("train.compile", "true,false", (True, False)),
    ("train.compile", [True, "False"], (True, False)),
    ("encoder.depth", "18,34", (18, 34)),
    ("encoder.batchnorm", "global,8,per_worker", ("global", 8, "per_worker")),
    ("train.micro_batch", "none,32", (None, 32)),
    ("loss.name", ["nt_xent", "nt_logistic"], ("nt_xent", "nt_logistic")),
    ("views.operations", "crop+colour,crop,none", (("crop", "colour"), ("crop",), None)),
    ("views.area", "[0.08,1],[0.2,1]", ((0.08, 1), (0.2, 1))),
    ("views.blur_p", "0,0.5,[1.0,0.1]", (0.0, 0.5, (1.0, 0.1))),
    ("views.blur_p", "uniform:0:1", Between(0.0, 1.0)),
    ("optim.base_lr", "x0.5,x2,0.3", (Peak(0.5), Peak(2.0), 0.3)),
    ("train.batch_size", ["x0.5", "x1"], (Times(0.5), Times(1.0))),
    ("optim.base_lr", "log:0.1:3", Between(0.1, 3.0, log=True)),
    ("views.flip_p", "uniform:0:1", Between(0.0, 1.0)),
    ("optim.base_lr", "log:x0.25:x4", PeakBetween(0.25, 4.0)),
    ("head.d_out", "log:16:256", WholeBetween(16, 256, log=True)),
    ("train.batch_size", "uniform:x0.5:x1", WholeBetween(TINY.train.batch_size // 2, TINY.train.batch_size)),
]
REFUSED = [
    ("optim.base_lt=0.1", "the config has no field 'optim.base_lt'; nearest: optim.base_lr"),
    ("optim=0.1", "optim is a group of fields; name one of them: optim.name, optim.base_lr"),
    ("seed=1,2", "the seed is varied by --seeds N"),
    ("loss.name=nt_xnt", r"loss.name does not take 'nt_xnt'; expected one of nt_xent, .*; nearest: nt_xent$"),
    ("head.layers=2.5", "head.layers does not take '2.5'; expected int"),
    ("head.layers=many", "head.layers does not take 'many'; expected int"),
    ("train.compile=1", "train.compile does not take '1'; expected bool"),
    ("optim.base_lr=0.1,", "optim.base_lr does not take ''; expected float"),
    ("optim.base_lr=log:0.1", "optim.base_lr=log:0.1 is no range; expected log:LOW:HIGH or uniform:LOW:HIGH, as log:0.1:3"),
    ("optim.base_lr=log:0.1:many", "'many' is no number"),
    ("optim.base_lr=log:3:0.1", "has no room; expected the lower end first"),
    ("optim.base_lr=log:0:1", "there is no logarithm of 0"),
    ("optim.base_lr=uniform:x1:x2", "drawn in their logarithm; use log:x1:x2"),
    ("head.layers=uniform:1.5:3", "head.layers takes whole numbers"),
    ("loss.name=log:1:2", "log:1:2 is a range of numbers: give the values themselves"),
    ("loss.name=x2", "loss.name x2 is no multiple: the recipe's loss.name is nt_xent"),
    ("views.blur_p=[1.0,0.1,0.2]", r"views.blur_p does not take '\[1.0,0.1,0.2\]'; expected float or tuple\[float, float\]$"),
    ("views.flip_p=uniform:0:2", r"views.flip_p is 2.0; expected a probability in \[0, 1\]"),
    ("train.batch_size=60,600", "batch_size 600 is larger than the training split"),
    ("head.layers", "is no assignment; expected FIELD=VALUE"),
]


@pytest.mark.parametrize(("path", "given", "values"), VALUES)
def test_words_are_values_of_the_fields_own_type(path: str, given: Any, values: Any) -> None:
    axis = words.axis(TINY, path, given)
    assert axis.paths == (path,) and axis.values == values
    if isinstance(values, tuple):
        assert list(map(type, axis.values)) == list(map(type, values))  # 1 and 1.0 and True are equal
        # Read again from JSON, as a sweep that goes on reads them.
        assert words.axis(TINY, path, json.loads(json.dumps(given))) == axis


@pytest.mark.parametrize(("word", "sentence"), REFUSED)
def test_words_that_a_field_does_not_take_are_refused(simclr: Run, patterns: Path, word: str, sentence: str) -> None:
    refused(simclr("sweep", "--vary", word, "--recipe", "patterns_tiny", "--data", patterns), sentence)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("smoke", "--vary", "head.layers=2"), "--vary and --space make a space of their own; leave out smoke"),
        (("--vary", "head.layers=2", "head.layers=3"), "--vary has head.layers twice"),
        (("--vary", "head.layers=2", "--set", "head.layers=3"), "head.layers is both varied and set"),
        (("--vary", "head.layers=2,3", "--scheduler", "pbt"), "pbt changes a run that goes on"),
        (
            ("--vary", "head.layers=2,3", "loss.temperature=0.1,0.5", "--scheduler", "pbt"),
            "differ in head.layers for good",
        ),
        (("--vary", "optim.base_lr=log:0.1:1", "--search", "grid"), "no grid covers"),
        (("--vary", "watch.k=" + ",".join(map(str, range(1, 400))), "watch.bank=uniform:1:999", "--trials", "300"), "119,700 trials"),
        (("--space", "nothing.yaml"), "there is no space nothing.yaml; expected `vary:`"),
    ],
)
def test_a_space_of_ones_own_that_cannot_work_is_refused(simclr: Run, patterns: Path, given: tuple[str, ...], sentence: str) -> None:
    refused(simclr("sweep", *given, "--recipe", "patterns_tiny", "--data", patterns), sentence)


FILES = [
    ("[1, 2", "is no YAML"),
    ("head.layers: 2", "is no space; expected `vary:`"),
    ("vary: {head.layers: [2]}\nfixed: {}", "has 'fixed'; expected `vary:`"),
    ("vary: {head: {layers: 2}}", r"has 'head': \{'layers': 2\} below vary"),
    ("vary: {optim.base_lr: 2026-11-27}", "below vary"),
    ("vary: {head.layers: [3, true]}", "head.layers does not take True; expected int"),
    ("vary: {head.layers: []}", "head.layers has no values"),
    ("vary: {head.layers: 3}\nset: {optim.base_lt: 1}", "nearest: optim.base_lr"),
    ("vary: {head.layers: 3}\nset: {head.layers: 2}", "head.layers is both varied and set"),
]


@pytest.mark.parametrize(("text", "sentence"), FILES)
def test_a_file_that_says_something_else_is_refused(simclr: Run, patterns: Path, tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "heads.yaml").write_text(text)
    refused(simclr("sweep", "--space", "heads.yaml", "--recipe", "patterns_tiny", "--data", patterns), sentence)


def asked(*given: object) -> sweep_dir.Sweep:
    """The sweep of a command."""
    return sweep._asked(cli.parse("sweep", sweep.Args, [str(word) for word in given]))


def test_ranges_are_drawn_and_lists_are_crossed(patterns: Path, tmp_path: Path) -> None:
    """N draws, each with every combination of the lists, whose configs are what the words say."""
    command = ("--recipe", "patterns_tiny", "--data", patterns, "--set", "train.batch_size=60", "--out", tmp_path / "s")
    varied = ("--vary", "head.layers=2,3", "train.linear_eval=true,false", "optim.base_lr=log:0.1:3", "head.d_out=uniform:8:16")
    found = asked(*varied, *command, "--trials", "5", "--seeds", "2")
    codes = validate.check(found, read_manifest(patterns))
    assert found.search == "mixed" and len(codes) == 2 * 2 * 5 * 2
    space, base = found.restricted, found.base
    points = [resolve.point(space, base, {a.key: resolve.chosen(a, c.axes[a.key]) for a in space.axes}, c.seed) for c in codes]
    configs = [point.config for point in points]
    draws = {(c.optim.base_lr, c.head.d_out) for c in configs}
    assert len(draws) == 5 and all(0.1 <= lr <= 3 and 8 <= d <= 16 and isinstance(d, int) for lr, d in draws)
    assert all(c.train.batch_size == 60 for c in configs)
    crossed = {(lr, d, layers, linear, seed) for lr, d in draws for layers in (2, 3) for linear in (True, False) for seed in (0, 1)}
    assert {(c.optim.base_lr, c.head.d_out, c.head.layers, c.train.linear_eval, c.seed) for c in configs} == crossed
    assert validate.check(asked(*varied, *command, "--trials", 5, "--seeds", 2), read_manifest(patterns)) == codes
    for code, config in zip(codes, configs, strict=True):  # a trial's own config gives its codes again
        assert resolve.codes_of(space, base, config) == code.axes
    for words_, search, trials in ((("head.layers=2,3",), "grid", 2), (("head.d_out=uniform:8:16",), "random", 16)):
        other = asked("--vary", *words_, *command)
        assert other.search == search and len(validate.check(other, read_manifest(patterns))) == trials
    some = asked("--vary", "head.layers=1,2,3", "head.d_out=8,16", *command, "--trials", "4")
    assert some.search == "random" and len(validate.check(some, read_manifest(patterns))) == 4


def test_multiples_follow_the_scaling_rule(patterns: Path, tmp_path: Path) -> None:
    """App. B.1: 0.3 · N / 256 and 0.075 · √N are 4.8 at N = 4096, the recipe's batch, and at half of it 2.4 and 4.8 / √2."""
    vary = {"optim.base_lr": "x1", "optim.scaling": "linear,sqrt", "train.batch_size": "x0.5,x1"}
    base = recipe("imagenet_resnet50")
    space = words.space("mine", vary, base)
    found = {}
    for combination in resolve.combinations(space):
        config = resolve.point(space, base, combination, 0).config
        n = config.train.batch_size
        found[config.optim.scaling, n] = config.optim.base_lr * (n / 256 if config.optim.scaling == "linear" else math.sqrt(n))
    expected = {("linear", 4096): 4.8, ("sqrt", 4096): 4.8, ("linear", 2048): 2.4, ("sqrt", 2048): 4.8 / math.sqrt(2)}
    assert found == {key: pytest.approx(value) for key, value in expected.items()}


def test_depths_are_those_that_the_user_names() -> None:
    """The spaces' own lists have two families, of which a recipe takes one; what a user names is not thinned silently."""
    space = words.space("vary", {"encoder.depth": "8,18"}, TINY)
    assert resolve.restricted(space, TINY, {}).axes[0].values == (8, 18)


def test_a_space_in_yaml_is_the_same_and_goes_on_without_its_file(patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "# heads\nvary:\n  head.layers: [2, 3]\n  optim.base_lr: log:0.1:3\n  views.area: [[0.08, 1.0], [0.2, 1.0]]\n"
    text += "set:\n  train.batch_size: 60\n"
    Path("heads.yaml").write_text(text)
    command = ("--recipe", "patterns_tiny", "--data", patterns, "--trials", "2")
    found = asked("--space", "heads.yaml", *command)
    varied = ("head.layers=2,3", "optim.base_lr=log:0.1:3", "views.area=[0.08,1.0],[0.2,1.0]")
    same = asked("--vary", *varied, *command, "--set", "train.batch_size=60")
    assert found.space == "heads" and found.path.name.startswith("sweep-heads-") and found.restricted.axes == same.restricted.axes
    assert found.base == same.base and asked("--space", "heads.yaml", *command).path == found.path
    found.save()
    plan.keep_space(found)
    codes = plan.settled(found, validate.check(found, read_manifest(patterns)))
    Path("heads.yaml").unlink()
    again = asked("--resume", found.path)
    assert again.vary == found.vary and again.restricted == found.restricted
    plan.keep_space(again)
    assert plan.settled(again, validate.check(again, read_manifest(patterns), under_way=True)) == codes
    text = json.loads((found.path / "plan.json").read_text())
    text["trials"][0]["axes"]["optim.base_lr"] = 7.0
    (found.path / "plan.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="no trial of heads is"):
        plan.settled(again, validate.check(again, read_manifest(patterns)))
    # The same directory with another space is another sweep.
    with pytest.raises(UserError, match="belongs to another sweep: vary"):
        sweep._same(again, dataclasses.replace(again, vary={"head.layers": [2]}))


def test_older_sweeps_keep_their_default_directory_and_their_file(patterns: Path, tmp_path: Path) -> None:
    """Their names were drawn before there was a space of one's own, and earlier versions read what has none."""
    found = a_sweep(tmp_path / "s", "smoke")
    assert "vary" not in sweep._key(found)
    found.save()
    assert "vary" not in json.loads((found.path / "sweep.json").read_text())
    assert sweep_dir.load(found.path).restricted == found.restricted
    plan.keep_space(found)
    assert set(json.loads((found.path / "space.json").read_text())["axes"][0]) == {"paths", "values", "label"}


def test_a_trials_command_gives_its_config(tmp_path: Path) -> None:
    """What the record of a trial says can be given to `simclr pretrain`: booleans and values of several parts, too."""
    vary = {
        "train.compile": "true",
        "optim.nesterov": "false",
        "views.operations": "crop+colour",
        "views.area": "[0.2,1.0]",
        "views.blur_p": "[1.0,0.1]",
        "train.micro_batch": "none",
        "encoder.batchnorm": "8",
        "optim.base_lr": "1e-6",
    }
    space = words.space("vary", vary, TINY)
    config = resolve.point(space, TINY, resolve.combinations(space)[0], 0).config
    line = shlex.split(shlex.join([word for path in vary for word in _flag(path, resolve.value_of(config, path))]))
    assert cli.parse("pretrain", pretrain.Args, ["patterns_tiny", "--data", "x", *line]).config == config


def test_a_trial_of_another_method_opens_its_run(tmp_path: Path, patterns: Path) -> None:
    """A sibling's config states its method, which is no field and no flag."""
    found = dataclasses.replace(a_sweep(tmp_path / "s", "vary", vary={"ema": "0.5,0.9"}, recipe="patterns_moco"), data=str(patterns))
    base = dataclasses.replace(recipe("patterns_moco"), queue=128)
    run = _open(found, tmp_path / "s" / "trials" / "one", resolve.changed(base, {"ema": 0.5}), "")
    words = shlex.split(run.command)
    assert run.config.METHOD == "moco" and words[2] == "patterns_moco" and words[-2:] == ["--queue=128", "--ema=0.5"]


def test_the_page_of_a_space_of_ones_own(tmp_path: Path) -> None:
    """A plot for each field, by both scores: curves over numbers, bars over names, a cloud over a range with round numbers on a
    logarithmic axis, coloured by a field with few values. Trials of one seed have no error bars, however many share a place."""
    vary = {"optim.base_lr": "log:0.1:3", "head.layers": "2,3", "loss.name": "nt_xent,nt_xent_dot", "train.compile": "true,false"}
    found = a_sweep(tmp_path / "s", "vary", vary=vary, search="mixed", trials=8)
    trained(found, lambda point: 0.5 + 0.1 * point.config.head.layers)
    page = report.report(found.path).read_text()
    panels = page.split('<figure class="panel">')[1:]
    assert len(panels) == 2 * 4 + 3
    assert all(f"<b>{path}</b>" in panel for path, panel in zip(vary, panels, strict=False))
    cloud, layers, names, _ = panels[:4]
    assert "base learning rate, logarithmic" in cloud and "head.layers 2" in cloud and "head.layers 3" in cloud
    assert '<span class="x"' in cloud and ">0.5<" in cloud and ">1<" in cloud
    assert ">nt_xent<" in names and 'class="k0 bar"' in names and 'class="line"' in layers
    assert 'class="whisker" d=""' in layers and "no error bars" in page
    two = a_sweep(tmp_path / "two", "vary", vary=vary, search="mixed", trials=3, seeds=2)
    trained(two, lambda point: 0.5 + 0.1 * point.config.head.layers + 0.01 * point.seed)
    page = report.report(two.path).read_text()
    assert 'class="whisker" d="M' in page and "lowest and highest of 2 seeds" in page


def test_one_seed_has_no_error_bars_where_two_rules_give_one_rate(tmp_path: Path) -> None:
    """At the recipe's batch both scaling rules give one rate: two trials of one seed, which are no spread over seeds."""
    found = a_sweep(tmp_path / "s", "temperature-lr")
    numbers = iter(range(1000))
    trained(found, lambda point: 0.5 + next(numbers) / 1000)
    page = report.report(found.path).read_text()
    assert "One seed: no error bars" in page and 'class="whisker" d="M' not in page and "n = 2" not in page


def test_every_field_can_be_varied() -> None:
    """Each field of the config takes its own value in words, but for the seed."""
    for path in SimCLR().flat():
        if path != "seed":
            value = resolve.value_of(SimCLR(), path)
            (same,) = words.axis(SimCLR(), path, [json.loads(json.dumps(value))]).values
            assert same == value and resolve.changed(SimCLR(), {path: same}) == SimCLR()
    assert set(spaces.SPACES["search"].axes[0].paths) <= set(SimCLR().flat())
