"""A config as a file: what is written is read back, and no word of YAML is taken for another than it looks."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from pipelines import cli
from pipelines.commands import distill, finetune, pretrain, recipes
from pipelines.runs import config_file
from simclr.config import Optim
from simclr.errors import UserError
from simclr.recipes import RECIPES, changed_from, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_written_is_read_back_equal_with_the_meaning_of_every_field(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config_file.written(recipe(name), inspect.getdoc(RECIPES[name]) or "", {"recipe": name}))
    assert config_file.read(path) == config_file.Named(name, recipe(name))
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 140
    assert "  # Learning rate per 256 images, before scaling (App. B.1).\n  base_lr: " in text
    plain = yaml.safe_load(text)  # other readers of YAML, which follow 1.1, read the same
    del plain["recipe"]
    assert type(recipe(name)).from_dict(plain) == recipe(name)


def test_every_field_has_a_comment() -> None:
    lines = config_file.written(recipe("patterns_tiny")).splitlines()
    fields = [at for at, line in enumerate(lines) if re.match(r" *\w+: \S", line)]
    assert len(fields) == len(recipe("patterns_tiny").flat())
    assert [lines[at] for at in fields if not lines[at - 1].lstrip().startswith("# ")] == []


PATTERNS = "recipe: patterns_tiny\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optim: {base_lr: 1e-4}", 1e-4),  # YAML 1.1 has no number without a point there
        ("optim: {base_lr: 1.5E+1}", 15.0),
        ("optim:\n  base_lr: .5", 0.5),
        ("optim:\n  base_lr: 2", 2),
        ("optim.base_lr: 0.25", 0.25),
        ("optim:\n  # base_lr: 3", 4.0),
    ],
)
def test_numbers_are_read_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    (tmp_path / "a.yaml").write_text(PATTERNS + text)
    read = config_file.read(tmp_path / "a.yaml")
    assert read.recipe == "patterns_tiny" and read.config == replace(
        recipe("patterns_tiny"), optim=replace(recipe("patterns_tiny").optim, base_lr=value)
    )


def test_a_probability_of_each_view_is_read_and_written_as_a_list(tmp_path: Path) -> None:
    views = replace(recipe("patterns_tiny").views, blur_p=(1.0, 0.1), solarise_p=0.2)
    (tmp_path / "a.yaml").write_text(PATTERNS + "views: {blur_p: [1.0, 0.1], solarise_p: 0.2}")
    read = config_file.read(tmp_path / "a.yaml").config
    assert read == replace(recipe("patterns_tiny"), views=views)
    (tmp_path / "b.yaml").write_text(config_file.written(read))
    assert "blur_p: [1.0, 0.1]" in (tmp_path / "b.yaml").read_text() and config_file.read(tmp_path / "b.yaml").config == read
    assert changed_from("patterns_tiny", read) == "patterns_tiny, views.blur_p 1.0 0.1, views.solarise_p 0.2"


@pytest.mark.parametrize("begun", [0.0, (1.0, 0.1)])
def test_a_flag_takes_one_probability_or_two(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, begun: float | tuple[float, float]
) -> None:
    """Whatever the recipe has; other numbers of words are refused with the flag's name."""
    base = recipe("patterns_tiny")
    (tmp_path / "a.yaml").write_text(config_file.written(replace(base, views=replace(base.views, blur_p=begun))))
    given = ["--config", str(tmp_path / "a.yaml"), "--data", "x", "--views.blur-p"]
    for words, value in ((["1.0", "0.2"], (1.0, 0.2)), (["0"], 0.0)):
        assert cli.parse("pretrain", pretrain.Args, [*given, *words, "--seed", "3"]).config.views.blur_p == value
    with pytest.raises(SystemExit) as ended:
        cli.parse("pretrain", pretrain.Args, [*given, "1", "0.1", "0.2"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Error parsing --views.blur-p" in said and "input length 3 did not match" in said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {compile: no}", "line 2: train.compile is the text 'no'; expected true or false"),
        ("train: {compile: on}", "train.compile is the text 'on'; expected true or false"),
        ("train: {compile: 1}", "train.compile is 1; expected true or false"),
        ("train:\n  batch_size: 0100", "line 3: train.batch_size is the text '0100'; expected a whole number"),
        ("train: {batch_size: 4_096}", "train.batch_size is the text '4_096'; expected a whole number"),
        ("train: {batch_size: 1:30}", "train.batch_size is the text '1:30'"),
        ("train: {batch_size: 128.0}", "train.batch_size is 128.0; expected a whole number"),
        ("train: {batch_size: '128'}", "train.batch_size is the text '128'; expected a whole number"),
        ("train: {batch_size: }", "train.batch_size is empty; expected a whole number"),
        ("optim: {base_lr: .nan}", "optim.base_lr is the text '.nan'; expected a number"),
        ("optim: {base_lr: 1e999}", "optim.base_lr is inf; expected a number"),
        ("optim: {base_lr: 2026-11-27}", "optim.base_lr is the text '2026-11-27'"),
        ("views: {area: 0.2, aspect: 1}", "views.area is 0.2; expected tuple"),
        ("views:\n  blur_p: [1, 0.1, 0.2]", r"line 3: views.blur_p is \[1, 0.1, 0.2\]; expected a number or tuple\[a number, a number\]"),
        ("views: {solarise_p: [0, 1.2]}", r"views.solarise_p is \(0, 1.2\); expected a probability in \[0, 1\]"),
        ("views: {area: [0.2]}", r"views.area is \[0.2\]; expected tuple"),
        ("train: {precision: bf16}", "train.precision is the text 'bf16'; expected one of float32, tf32, bfloat16"),
        ("train: 5", "train is 5; expected its fields below it, as train.batch_size"),
        ("train: {batchsize: 5}", "line 2: unknown field train.batchsize; nearest: train.batch_size"),
        ("batch_size: 5", "unknown field batch_size; nearest: train.batch_size"),
        ("optim: {lr: 5}", "unknown field optim.lr; nearest: .*optim"),
        ("seed: 1\ntrain: {epochs: 3}\nseed: 2", "line 4: seed is there twice, first in line 2"),
        ("train: &t {epochs: 3}\noptim: *t", r"has an alias \(\*name\)"),
        ("seed: !!python/object/apply:os.getcwd []", "line 2: tag:yaml.org,2002:python/object/apply:os.getcwd is a tag|seed is"),
        ("seed: !x 3", "is a tag; write the value alone"),
        ("train: [", "is no YAML, line"),
        ("train: {epochs: 0}", "a.yaml: train.epochs is 0; expected more than 0"),
        ("? [a]\n: 3", "line 2: expected the name of a field"),
    ],
)
def test_what_is_no_value_of_a_field_is_named_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "a.yaml").write_text(PATTERNS + text)
    with pytest.raises(UserError, match=sentence):
        config_file.read(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: 3", "leaves out encoder.batchnorm and [0-9]+ more, and names no recipe to take it from; add a line recipe: NAME"),
        ("recipe: patterns\nseed: 3", "line 1: unknown recipe 'patterns', and .* would come from it; nearest: patterns_"),
        ("recipe: ../up\nseed: 3", "line 1: recipe is '../up'; expected a name"),
        ("", "is empty"),
        ("[1]", "has no fields"),
    ],
)
def test_a_file_that_leaves_fields_out_says_whose_they_are(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        config_file.read(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"is no file; `simclr recipes NAME > run.yaml` writes one"):
        config_file.read(tmp_path / "b.yaml")


def test_a_whole_file_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    mine = replace(recipe("patterns_tiny"), seed=7)
    (tmp_path / "my run.yaml").write_text(config_file.written(mine))
    assert config_file.read(tmp_path / "my run.yaml") == config_file.Named("my_run", mine)
    (tmp_path / "b.yaml").write_text(config_file.written(mine, names={"recipe": "mine"}))
    assert config_file.read(tmp_path / "b.yaml") == config_file.Named("mine", mine)


def test_run_json_is_read_and_one_of_another_stage_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    text = {"recipe": "patterns_tiny", "config": recipe("patterns_tiny").to_dict(), "schema": 1}
    del text["config"]["train"]["compress_gradients"]  # type: ignore[index]  # as earlier versions wrote it
    (run / "run.json").write_text(json.dumps(text))
    for place in (run, run / "run.json"):
        assert config_file.read(place) == config_file.Named("patterns_tiny", recipe("patterns_tiny"))
    with pytest.raises(UserError, match="is a run of `simclr pretrain`, and `simclr finetune` cannot take its config"):
        config_file.read(run, "finetune")
    (run / "run.json").write_text(json.dumps(text | {"config": {"sed": 1}}))
    with pytest.raises(UserError, match=r"run\.json: unknown field sed; nearest: seed"):
        config_file.read(run)


def test_the_later_stages_have_files_of_their_settings(tmp_path: Path) -> None:
    for name, kind in (("finetune", finetune), ("distill", distill)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipes.stage(name))
        empty = kind.Args(Path("x"))  # type: ignore[attr-defined]
        assert config_file.changed(empty, config_file.entries(path), path, kind.Args.SETTINGS) == empty  # type: ignore[attr-defined]
    (tmp_path / "a.yaml").write_text("labels: 0.01\noptim: {name: sgd, base_lr: 0.05}\n")
    read = finetune.Args.defaults(["x", "--config", str(tmp_path / "a.yaml")])
    assert read is not None and read.labels == 0.01 and read.optim == replace(finetune.Args(Path("x")).optim, name="sgd", base_lr=0.05)
    (tmp_path / "a.yaml").write_text("data: x\n")  # where, not what
    with pytest.raises(UserError, match="line 1: unknown field data"):
        finetune.Args.defaults(["x", f"--config={tmp_path / 'a.yaml'}"])


def test_a_changed_recipe_says_what_was_changed() -> None:
    base = recipe("cifar10_resnet18")
    assert changed_from("cifar10_resnet18", base) == "cifar10_resnet18"
    deeper = replace(base, encoder=replace(base.encoder, depth=50))
    assert changed_from("cifar10_resnet18", deeper) == "cifar10_resnet18, encoder.depth 50"
    assert changed_from("finetune-cifar10_resnet18", replace(deeper, optim=Optim())) == "finetune-cifar10_resnet18, encoder.depth 50"
    assert changed_from("mine", deeper) == "mine"
    other = replace(deeper, optim=replace(base.optim, base_lr=1.0, momentum=0.5), train=replace(base.train, epochs=3))
    assert changed_from("cifar10_resnet18", other) == "cifar10_resnet18, encoder.depth 50, optim.base_lr 1.0, optim.momentum 0.5 and 1 more"
