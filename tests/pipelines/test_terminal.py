"""What others named reaches no terminal, log or table as it is."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines import terminal
from pipelines.html.charts import escape
from tests.support.command import Run
from tests.support.paths import ROOT

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp"
ESCAPED = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202egnp"


def obeyed(text: str) -> list[str]:
    """The signs in `text` that a terminal obeys or does not show."""
    return [c for c in text if not c.isprintable() and c not in "\n\u00a0"]


def test_only_the_terminal_prints() -> None:
    """So that the filter stands in one place. The usage has our words alone; benches print figures; a node's notice filters its own."""
    allowed = {"pipelines/terminal.py", "pipelines/cli.py", "pipelines/clusterfile/preemption.py"}
    found = set()
    for path in [p for room in ("simclr", "pipelines", "tune") for p in (ROOT / room).rglob("*.py")]:
        name, text = str(path.relative_to(ROOT)), path.read_text()
        for node in ast.walk(ast.parse(text)) if "print" in text or "sys.std" in text else ():
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("print", "traceback.print_exception", "traceback.print_exc", "sys.stderr.write", "sys.stdout.write"):
                found.add(name)
    assert {name for name in found if not name.startswith("pipelines/bench/")} == allowed


def test_a_folder_of_evil_names(simclr: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    classes = (f"cat{EVIL}", "=dog", "line\nbreak")
    for name in classes:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / classes[0] / f"broken{EVIL}.png").write_bytes(b"\x89PNG no picture")
    (tmp_path / "photos" / classes[1] / "-2+3.png").write_bytes(b"\x89PNG no picture")
    (tmp_path / "photos" / classes[2] / f"a{EVIL}.exe").write_bytes(b"x")
    shards = ("--out", f"shards{EVIL}")
    prepared = ("prepare", "--source", "photos", "--max-skipped-pct", "50")
    said = []
    for command in ((*prepared, "--dry-run"), (*prepared, *shards), ("prepare", "--source", f"no{EVIL}\nsimclr: well", *shards)):
        code, out, err = simclr(*command)
        said.append(out + err)
        assert obeyed(out + err) == [] and code == (2 if "well" in command[2] else 0), out + err
    assert ESCAPED in said[0] and ESCAPED in said[1] and f"no{ESCAPED}" in said[2]
    assert [line for line in said[2].splitlines() if line.startswith("simclr: ")][1:] == []
    code, out, err = simclr("embed", "nowhere", f"--{EVIL}=1")  # as a shell expands * to it
    assert code == 2 and obeyed(out + err) == [] and "no option has such characters" in err
    with (tmp_path / f"shards{EVIL}" / "skipped.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "reason"]
    assert sorted(row[0] for row in rows[1:]) == sorted(["'=dog/-2+3.png", f"cat{ESCAPED}/broken{ESCAPED}.png"])
    assert not any(obeyed(field) for row in rows for field in row)


@pytest.mark.parametrize("words", [("cluster", EVIL, "f"), ("prepare", EVIL), ("pull", "a", EVIL), ("bench", EVIL), ("runs", "a", EVIL)])
def test_a_word_that_the_parser_complains_of(simclr: Run, words: tuple[str, ...]) -> None:
    code, out, err = simclr(*words)
    assert code == 2 and obeyed(out + err) == [] and "\\x1b]0;owned" in err and "│" in err


def test_a_default_in_the_help(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """With --extend the defaults are those of a run, which may be somebody else's."""
    from pipelines import cli
    from pipelines.commands import pretrain
    from simclr.recipes import recipe

    theirs = pretrain.Args(data=Path(f"data{EVIL}"), config=recipe("patterns_tiny"), recipe="patterns_tiny")
    monkeypatch.setattr(pretrain.Args, "defaults", lambda words: theirs)
    with pytest.raises(SystemExit) as end:
        cli.parse("pretrain", pretrain.Args, ["--help"])
    out, err = capfd.readouterr()
    assert end.value.code == 0 and "\\x1b]0;owned" in out and obeyed(out + err) == []


def test_evil_runs_and_evil_bugs(simclr: Run, tmp_path: Path, patterns: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from pipelines.runs.directory import open_run
    from simclr.recipes import recipe

    for name in (f"a{EVIL}", "b\nfake  complete"):
        open_run(tmp_path / "runs" / name, "patterns_tiny", recipe("patterns_tiny"), patterns).save()
    run_json = tmp_path / "runs" / "c" / "run.json"
    run_json.parent.mkdir()
    run_json.write_text(json.dumps({"recipe": f"x\n{EVIL}", "created": 1.0, "schema": 99}))
    code, out, _ = simclr("runs", "runs")
    assert code == 0 and len(out.splitlines()) == 4 and obeyed(out) == []  # a row for each run, and the head
    terminal.bug(f"Traceback\n  File\nValueError: {EVIL} at http://me:secret@host\n")
    terminal.bug(ValueError(f"bad name {EVIL}"))
    err = capfd.readouterr().err
    assert obeyed(err) == [] and "secret" not in err and f"ValueError: bad name {ESCAPED}" in err


def test_a_bug_in_a_command_is_filtered_too(tmp_path: Path) -> None:
    """The interpreter prints an exception that nobody catches."""
    code = f"""
import pipelines.commands.recipes as command
from pipelines import cli
def broken(args): raise KeyError({EVIL!r} + " https://me:secret@host?token=secret")
command.main = broken
cli.main(["recipes"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 1 and "KeyError" in done.stderr and "secret" not in done.stderr and obeyed(done.stderr) == []


def test_the_bar_is_text_not_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(terminal, "Console", lambda stderr: Console(file=out, force_terminal=True, width=150))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(terminal, "_QUIET", False)
    with terminal.Bar(f"[red]a{EVIL}", 10) as bar:
        bar.update(5, f"[/] [blink]loss 4{EVIL}")
    drawn = out.getvalue()
    assert (
        "[/] [blink]loss 4" in drawn and "[red]a" in drawn and "\x1b]0;" not in drawn and "\x1b[2J" not in drawn and "\u202e" not in drawn
    )


def test_a_page_holds_no_control_character() -> None:
    assert escape(f"<b>{EVIL}\x00\udcff\n&") == f"&lt;b&gt;{ESCAPED}\\x00?\n&amp;"
