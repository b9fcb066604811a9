"""Text of others (names of files, classes, models; a server's answers) where it reaches a terminal, a log, a page or a cell of CSV."""

from __future__ import annotations

import numbers
import re
import unicodedata

_SIGN = r"[=+\-@＝＋－＠]"  # spreadsheets take the wide forms too
_FORMULA = re.compile(rf"[\s']*{_SIGN}")
_LATER_FORMULA = re.compile(rf"([;|])(?=[\s'\"]*{_SIGN})")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_QUERY = re.compile(r"[?#][^\s'\"<>]*")
# A password with spaces in it. What begins like a port is none.
_SPACED_LOGIN = re.compile(r"://[^\s/:@\[]{1,200}:(?!\d{1,5}\b)\S[^@\n/'\"<>]{0,200}@")
_HEADER = re.compile(r"\b((?:proxy-)?authorization\\*['\"]?[ \t]*[:=][ \t]*\\*['\"]?)[^\s'\"\\][^'\"\\\n]*", re.IGNORECASE)
_SCHEME = re.compile(r"\b(bearer|basic|token(?= [\w.~+/=-]*\d)) [\w.~+/=-]{6,}", re.IGNORECASE)
# As in a header, in JSON and in Python: api-key: x, "token": "x", {\"password\": \"x\"}.
_SECRET = re.compile(
    r"((?:token|passw(?:or)?d|passphrase|secret(?:[_-]?access)?(?:[_-]?key)?|(?:api|access|private)[_-]?key|credential|signature)"
    r"\\*['\"]?[ \t]*[:=][ \t]*)(\\*'[^'\n]*'|\\*\"[^\"\n]*\"|\\*['\"]?[^\s,;&#'\"<>}\])]+)",
    re.IGNORECASE,
)
_MOST = 4_000  # characters of a line: what others send may have no end
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
    the order of reading, signs without width, and bytes of another encoding. Spaces of every script stay, and joiners where they show."""
    if line.isprintable():
        return line
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" or _joins(line, i) else repr(c)[1:-1] for i, c in enumerate(line)
    )


def _joins(line: str, i: int) -> bool:
    """Whether the sign at `i` is a joiner or non-joiner between two signs whose shape depends on it: Persian and Indic words, emoji.
    Letters of Europe's scripts do not join: two names that differ by a joiner there look the same."""
    return line[i] in "\u200c\u200d" and 0 < i < len(line) - 1 and _joinable(line[i - 1]) and _joinable(line[i + 1])


def _joinable(c: str) -> bool:
    category = unicodedata.category(c)
    return c > "\u0590" and (category[0] in "LM" or category in ("So", "Sk"))


def printable_lines(text: str) -> str:
    """`text` with each of its lines `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def paragraph(text: str) -> str:
    """`printable_lines` of a message: further lines begin with a space, so that none in a name reads as a message of its own."""
    first, *others = printable_lines(text).split("\n")
    return "\n".join([first, *(line if not line or line[0] == " " else f"  {line}" for line in others)])


def cut(text: str) -> str:
    """`text` with the rest of each very long line left out. For what a server sent."""
    return "\n".join(line if len(line) <= _MOST else f"{line[:_MOST]}…" for line in text.split("\n"))


def cell(value: object) -> object:
    """`value` as a cell of CSV. Numbers stay numbers. Other text is `printable`, and gets an apostrophe in front where a spreadsheet
    would compute it as a formula; one that has an apostrophe there already gets another, so that the first is never a name's own. So does
    what follows ; or | in it: where these separate cells, as in most of Europe, a spreadsheet cuts a line there, whatever is quoted."""
    if value is None or isinstance(value, numbers.Number):
        return value
    text = _LATER_FORMULA.sub(r"\1'", printable(str(value)))
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def redacted(text: str) -> str:
    """`text` without what a server would take as proof of who asks: the user and password of any address in it, the values of a query (of
    a signed address, ?token=…) that are not known to be plain, what an Authorization header has, and what is called a token, a password, a
    secret, a key or a signature. Takes time in proportion to the text's length, whatever it holds."""
    text = _SPACED_LOGIN.sub("://…@", text)
    text = re.sub(r"(?<!sqlite)://\S+", _without_login, text)
    text = _QUERY.sub(_without_values, text)
    text = _SCHEME.sub(r"\1 …", _HEADER.sub(r"\1…", text))
    return _SECRET.sub(_without_secret, text)


def _without_login(address: re.Match[str]) -> str:
    _, at, host = address[0].rpartition("@")
    return f"://…@{host}" if at else address[0]


def _without_values(query: re.Match[str]) -> str:
    return "".join(map(_hidden, re.split(r"([&;#?])", query[0])))


def _hidden(part: str) -> str:
    key, equals, _ = part.partition("=")
    return f"{key}=…" if equals and key not in _PLAIN else part


def _without_secret(pair: re.Match[str]) -> str:
    mark = re.match(r"\\*['\"]?", pair[2])
    opening = mark[0] if mark else ""
    closing = opening if opening and pair[2].endswith(opening) and len(pair[2]) > len(opening) else ""
    return f"{pair[1]}{opening}…{closing}"
