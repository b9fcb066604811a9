"""Text of others (names of files, classes, models; a server's answers) where it reaches a terminal, a log, a page or a cell of CSV."""

from __future__ import annotations

import numbers
import re
import unicodedata

_FORMULA = re.compile(r"[\s']*[=+\-@＝＋－＠]")  # spreadsheets take the wide forms too
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_PAIR = re.compile(r"(?P<key>[^\s=&;#?]+)=[^&;#]*")
_PLAIN = {
    *(
        "alias",
        "experiment_id",
        "experiment_name",
        "max_results",
        "metric_key",
        "name",
        "path",
        "run_id",
        "run_uuid",
        "version",
    ),  # MLflow's
    *("delimiter", "list-type", "partNumber", "prefix", "versionId", "X-Amz-Date", "X-Amz-Expires"),  # S3's
}


def printable(line: str) -> str:
    """`line` with everything escaped that is not seen as itself: control characters (a terminal obeys them), line breaks, marks that turn
    the order of reading, signs without width, and bytes of another encoding. Spaces of every script stay."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in line)


def printable_lines(text: str) -> str:
    """`text` with each of its lines `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def paragraph(text: str) -> str:
    """`printable_lines` of a message: further lines begin with a space, so that none in a name reads as a message of its own."""
    first, *others = printable_lines(text).split("\n")
    return "\n".join([first, *(line if not line or line[0] == " " else f"  {line}" for line in others)])


def cell(value: object) -> object:
    """`value` as a cell of CSV. Numbers stay numbers. Other text is `printable`, and gets an apostrophe in front where a spreadsheet
    would compute it as a formula; one that has an apostrophe there already gets another, so that the first is never a name's own."""
    if value is None or isinstance(value, numbers.Number):
        return value
    text = printable(str(value))
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def redacted(text: str) -> str:
    """`text` without what a server would take as proof of who asks: the user and password of any address in it, the values of a query (of
    a signed address, ?token=…) that are not known to be plain, and what follows Bearer and Basic in a header."""
    text = re.sub(r"(?<!sqlite)://\S*@", "://…@", text)
    text = re.sub(r"[?#]([^\s=&;#?'\"<>]+=[^\s&;#'\"<>]*[&;#]?)+", lambda query: _PAIR.sub(_hidden, query[0]), text)
    return re.sub(r"\b(Bearer|Basic) [\w.~+/=-]{6,}", r"\1 …", text)


def _hidden(pair: re.Match[str]) -> str:
    return pair[0] if pair["key"] in _PLAIN else f"{pair['key']}=…"
