"""`simclr COMMAND …`: finds the command's module, reads its flags from the dataclass `Args`, runs `main(args)`.

An error that the user can mend is one sentence and exit code 2. Every other error is a bug and shows its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import operator
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simclr import extras
from simclr.errors import UserError
from simclr.text import printable

# Commands of the rooms above this one. Nothing here may import them, so they are found by name when they are called.
_ABOVE = {"sweep": "tune.sweep"}
_END_S = 1.0  # that Ray gets to shut down after an interrupt

COMMANDS = {
    "demo": "the whole job on this machine: render, shard, pretrain, evaluate, register, pull, report",
    "prepare": "images (a folder, an archive, a dataset's name) → shards",
    "verify": "shards → a check of every byte and every image",
    "views": "shards + recipe → a picture of what the network sees",
    "pretrain": "shards → a pretrained encoder, on Ray Train workers",
    "finetune": "encoder + some labels → a classifier",
    "distill": "classifier + images → a student classifier",
    "evaluate": "encoder + data → kNN, linear probes, the papers' protocols, the transfer suite",
    "publish": "run → a version in the model registry, `champion` if it is the best",
    "pull": "registry → an encoder directory",
    "embed": "encoder + images → features, as Parquet parts or one file, on one machine or many",
    "neighbours": "features + pictures → the nearest rows, exactly, and a page of them",
    "curate": "features → near duplicates, a diverse choice or outliers: a list to train on, with reasons",
    "export": "encoder → a torch program, ONNX, or torchvision's names",
    "convert": "official TensorFlow checkpoint → an encoder directory",
    "report": "run → report.html",
    "sweep": "space + recipe + shards → many runs, and the paper's figures from them",
    "runs": "directory or s3:// prefix → its runs: state, step, images/s, last checkpoint",
    "recipes": "the named configs",
    "cluster": "cluster file → the nodes that it would start, and its mistakes",
    "bench": "measured comparisons on this machine",
}


def usage() -> str:
    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    more = "`simclr COMMAND --help` states every option with its unit and default; `simclr --version` says what is installed."
    return f"usage: simclr COMMAND [--help] …\n\n{rows}\n\n{more}"


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `simclr` command; exits with 0, 2 (a mistake in the input), 130 (interrupted), or 141 where the reader of its
    output, as `head`, has ended: what a shell says of a command that SIGPIPE ends."""
    argv = sys.argv[1:] if argv is None else argv
    from pipelines import environ, terminal

    terminal.set_quiet("--quiet" in argv)
    environ.prepare()
    try:
        _main(argv)
        sys.stdout.flush()  # here, where a closed pipe is noticed, and not as the interpreter ends
    except BrokenPipeError:
        if not (unread := _unread()):
            raise
        for stream in unread:  # what it still holds goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.exit(141)
    except SystemExit:
        for stream in _unread():
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        raise


def _unread() -> list[int]:
    """Which of standard output and standard error are pipes that nobody reads any more."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)  # errors are always told
    return [stream for stream, event in poll.poll(0) if event & select.POLLERR]


def _main(argv: list[str]) -> None:
    from pipelines import terminal

    if argv[:1] == ["--version"]:
        from pipelines.runs.environment import installed

        terminal.show(installed())
        return
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if argv else 2)
    name, rest = argv[0], argv[1:]
    try:
        if name not in COMMANDS:
            from difflib import get_close_matches

            near = get_close_matches(name, COMMANDS, n=3, cutoff=0.4) or list(COMMANDS)
            raise UserError(f"unknown command {name!r}; nearest: {', '.join(near)}")
        # A scheduler's SIGTERM ends the command by KeyboardInterrupt, like Ctrl-C. A shell's background jobs ignore SIGINT itself.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.excepthook = lambda kind, error, trace: terminal.bug(error)
        module = importlib.import_module(_ABOVE.get(name, f"pipelines.commands.{name}"))
        words = [a for a in rest if a != "--quiet"]
        if words and hasattr(module, "recipe_for") and Path(words[0]).is_dir():
            from pipelines.runs.config_file import given_to

            given = [] if given_to("--config", words) else [module.recipe_for(Path(words[0]))]
            words = [*given, "--data", *words]
        module.main(parse(name, module.Args, words))
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        if not (needed := extras.absent(error)):
            raise
        _fail(f"`simclr {name}` needs {needed}")
    except OSError as error:
        from simclr import files

        if not (sentence := files.trouble(error)):
            raise
        _fail(sentence)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the terminal shows ^C in the line
        terminal.complain("interrupted; run the same command again to go on")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if "ray" in sys.modules:
            from pipelines.train import ray_train

            ending = threading.Thread(target=ray_train.disconnect, daemon=True)
            ending.start()
            ending.join(_END_S)
        os._exit(130)  # does not wait for other threads, which may be in the middle of something


def _fail(sentence: str) -> None:
    from pipelines import terminal

    terminal.complain(f"simclr: {sentence}")
    ray_train = sys.modules.get("pipelines.train.ray_train")
    if ray_train is not None and ray_train.lost():
        os._exit(2)
    sys.exit(2)


def parse(name: str, args: type[Any], argv: list[str]) -> Any:
    """Read `argv` into the dataclass `args`. If it has a field `config`, the first word is a recipe or --config names a file, and the
    defaults are theirs, unless the class finds its `defaults` in the words."""
    import tyro

    from pipelines import terminal
    from pipelines.runs.config_file import given_to

    # A shell's * may bring such a word, as the name of a file.
    if odd := next((word for word in argv if word.startswith("-") and printable(word) != word), None):
        raise UserError(f"{odd}: no option has such characters; name a file ./{odd}, and give a value behind its option, without =")
    fields = {f.name: f for f in dataclasses.fields(args)}
    file, named = given_to("--config", argv) if "config_file" in fields else None, None
    default = args.defaults(argv) if hasattr(args, "defaults") else None
    if "config" in fields:
        named = argv[0] if argv and not argv[0].startswith("-") else None
        default = _begun(name, args, named, file, default, asks=bool({"-h", "--help"} & set(argv)))
        argv = argv[1:] if named else argv
        _require_own_flags(name, default, argv)
    usual = "\n".join(_usual(args, default))
    description = f"{inspect.getdoc(args)}\n\n--quiet: errors and results only.{usual and chr(10) * 2 + usual}"
    with terminal.filtered():  # its complaints repeat words as they are, its help the defaults
        return tyro.cli(args, args=argv, default=default, prog=f"simclr {name}", description=description)


def _begun(name: str, args: type[Any], named: str | None, file: str | None, found: Any, asks: bool) -> Any:
    """The defaults of a command of recipes: those `found`, or of the recipe `named`, or of the --config `file`; if the user `asks` for help
    and names nothing, some recipe's."""
    import tyro

    from pipelines.runs import config_file
    from simclr.recipes import recipe

    begun = [*([f"the recipe {named!r}"] if named else []), *([f"--config {file}"] if file else []), *(["--extend"] if found else [])]
    if len(begun) > 1:
        raise UserError(f"{' and '.join(begun)} each have a whole config; leave out one of them, flags change single fields")
    if found is not None:
        return found
    if file is not None:
        read = config_file.read(Path(file))
        return args(recipe=read.recipe, data=tyro.MISSING, config=read.config)
    if named is None and not asks:
        raise UserError(
            f"which recipe? `simclr {name} RECIPE …`, or `simclr {name} --config FILE …`; `simclr recipes` lists them, and "
            "`simclr recipes RECIPE > run.yaml` writes one as a file"
        )
    return args(recipe=named or "patterns_tiny", data=tyro.MISSING, config=recipe(named or "patterns_tiny"))


def _require_own_flags(name: str, default: Any, argv: list[str]) -> None:
    """Raises UserError for a flag that is a field of another method than the config's of the `default`."""
    from simclr.family import foreign

    for flag in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if whose := foreign(flag.removeprefix("--").replace("-", "_"), default.config):
            raise UserError(f"{flag}: {whose}; `simclr {name} {default.recipe} --help` lists its flags")


def _usual(args: type[Any], default: Any) -> Iterator[str]:
    """The flags that a class calls `usual`, in its order: each with its default and the first sentence on it. tyro's help has them all, by
    group, below."""
    if default is None or not hasattr(args, "usual"):
        return
    paths: dict[str, str] = args.usual(default.config)
    yield "The usual ones; every option follows, by group:"
    for flag, said in paths.items():
        value = _value(default, flag.removeprefix("--").replace("-", "_"))
        shown = f" ({value})" if isinstance(value, int | float | str) and not isinstance(value, bool) else ""
        yield f"  {flag:<24} {said}{shown}"


def _value(default: Any, path: str) -> Any:
    """A field of the defaults, or of their config or resources, whose flags have no prefix; None where none has such a path."""
    for root in (default, default.config, default.resources):
        with contextlib.suppress(AttributeError):
            return operator.attrgetter(path)(root)
    return None


if __name__ == "__main__":
    main()
