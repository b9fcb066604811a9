"""The table of mutations fits the code as it is: each still breaks something, and its tests are there. Running them is a command's work."""

from __future__ import annotations

import re
from types import CodeType

import pytest

from tests.support.mutation import Mutation
from tests.support.mutation_table import MUTATIONS
from tests.support.paths import ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_can_be_applied_and_its_tests_are_there(mutation: Mutation) -> None:
    whole = (ROOT / mutation.file).read_text()
    broken = mutation.applied(whole)
    # It is Python still, and says something else: the bytes of its code differ. (In one whole run CPython 3.11's `ast.parse` raised
    # "recursion depth mismatch", a fault of its own that `compile` does not have.)
    assert _code(broken) != _code(whole)
    for test in mutation.tests.split():
        file, _, name = test.partition("::")
        defined = set(re.findall(r"^def (\w+)\(", (ROOT / file).read_text(), re.MULTILINE))
        assert name.partition("[")[0] in defined if name else any(found.startswith("test_") for found in defined), test


def test_names_are_unique_and_every_room_is_there() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 50
    rooms = [mutation.file.partition("/")[0] for mutation in MUTATIONS]
    assert all(rooms.count(room) >= least for room, least in (("simclr", 18), ("pipelines", 9), ("tune", 3)))


def test_a_text_that_is_not_there_once_is_refused() -> None:
    mutation = Mutation("m", "simclr/loss.py", "a", "b", "")
    for text in ("", "a a"):
        with pytest.raises(AssertionError, match="expected once"):
            mutation.applied(text)
    assert mutation.applied("cat") == "cbt"


def _code(text: str) -> list[object]:
    """What the text compiles to, without lines and names of files."""

    def parts(code: CodeType) -> list[object]:
        inner = [parts(constant) if isinstance(constant, CodeType) else repr(constant) for constant in code.co_consts]
        return [code.co_code, code.co_names, code.co_varnames, inner]

    return parts(compile(text, "mutated", "exec", dont_inherit=True))
