"""Parts are done once each, in this process or by Ray's actors, and what goes wrong in one comes back as what it is."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipelines.parts.run import Where, run
from simclr.errors import UserError

PARTS = [{"n": n} for n in range(9)]


def make(settings: dict[str, Any]) -> Any:
    """Squares numbers; `kill` ends the process of that part once, `wrong` and `bug` fail in it."""
    if settings.get("refused"):
        raise UserError("no such encoder")

    def work(part: dict[str, Any]) -> dict[str, Any]:
        mark = Path(settings["folder"]) / "killed"
        if part["n"] == settings.get("kill") and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if part["n"] == settings.get("deadly"):
            os.kill(os.getpid(), signal.SIGKILL)
        if part["n"] == settings.get("wrong"):
            raise UserError("part 5 has no pictures")
        if part["n"] == settings.get("bug"):
            raise ZeroDivisionError
        with (Path(settings["folder"]) / f"done-{part['n']}").open("a") as file:
            file.write("x")
        carried = (Path(settings["carried"]) / "weights").read_text() if "carried" in settings else ""
        return {"square": part["n"] ** 2, "pid": os.getpid(), "carried": carried, "threads": settings["threads"]}

    return work


def squares(where: Where, folder: Path, carry: Path | None = None, **settings: Any) -> list[dict[str, Any]]:
    found = list(run(make, {"folder": str(folder), **settings}, PARTS, where, carry=carry))
    assert sorted(part["n"] for part, _ in found) == list(range(9))
    assert all(told["square"] == part["n"] ** 2 for part, told in found)
    return [told for _, told in found]


@pytest.fixture
def carry(tmp_path: Path) -> Path:
    (tmp_path / "carry").mkdir()
    (tmp_path / "carry" / "weights").write_text("w")
    return tmp_path / "carry"


def test_this_process_does_them_in_order(tmp_path: Path, carry: Path) -> None:
    told = squares(Where(cpus_per_worker=3), tmp_path, carry)
    assert {(t["pid"], t["carried"], t["threads"]) for t in told} == {(os.getpid(), "w", 3)}
    assert [t["square"] for t in told] == [n**2 for n in range(9)]
    with pytest.raises(UserError, match="part 5 has no pictures"):
        squares(Where(), tmp_path, wrong=5)
    with pytest.raises(ZeroDivisionError):
        squares(Where(), tmp_path, bug=5)
    assert list(run(make, {}, [], Where())) == []


def test_actors_do_them_and_one_that_is_killed_is_replaced(tmp_path: Path, carry: Path, shared_ray: None) -> None:
    told = squares(Where(workers=2), tmp_path, carry, kill=4)
    assert os.getpid() not in {t["pid"] for t in told} and {t["carried"] for t in told} == {"w"}
    assert (tmp_path / "killed").exists() and {t["threads"] for t in told} == {1}
    assert {path.name for path in tmp_path.glob("done-*")} == {f"done-{n}" for n in range(9)}


def test_a_part_that_kills_each_process_is_not_tried_for_ever(tmp_path: Path, shared_ray: None) -> None:
    with pytest.raises(
        UserError, match=r"processes that did one part died 4 times \(.*out of memory, or a picture that crashes its decoder"
    ):
        squares(Where(workers=1), tmp_path, deadly=0)


def test_what_a_user_can_mend_is_a_sentence_and_a_bug_is_a_traceback(
    tmp_path: Path, shared_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"^part 5 has no pictures$"):
        squares(Where(workers=1), tmp_path, wrong=5)
    with pytest.raises(UserError, match=r"^no such encoder$"):
        squares(Where(workers=1), tmp_path, refused=True)
    capfd.readouterr()
    with pytest.raises(RuntimeError, match="a worker failed; its traceback is above"):
        squares(Where(workers=1), tmp_path, bug=5)
    assert "ZeroDivisionError" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"64 workers with 1 CPUs each do not fit, there is room for 2; use fewer"):
        squares(Where(workers=64), tmp_path)
    with pytest.raises(UserError, match="--device cuda, but the cluster has no GPU"):
        list(run(make, {"folder": str(tmp_path)}, PARTS, Where(workers=1), "cuda"))


def test_numbers_of_workers_and_cores_are_checked() -> None:
    with pytest.raises(UserError, match="--workers is 0; expected at least 1"):
        Where(workers=0)
    with pytest.raises(UserError, match="--cpus-per-worker is -1; expected at least 1"):
        Where(cpus_per_worker=-1)
