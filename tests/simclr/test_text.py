"""The one filter for text of others: terminals, cells of CSV, credentials."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
import time
import unicodedata
from typing import Literal

import numpy as np
import pytest

from simclr.text import cell, paragraph, printable, printable_lines, redacted

ORDINARY = ("été 27 °C", "日本\u3000語", "91.3\u00a0%", "Übergröße", "кот", "עברית", "🐈", "a b", "C:\\dir\\new", "")


def test_no_sign_that_a_terminal_obeys_passes() -> None:
    """Over all of Unicode but the planes of Han and of nobody: what comes out has no control character, no line break, nothing without
    width and no mark of direction."""
    for begin in (*range(0, 0x20000, 1 << 12), 0xE0000, sys.maxunicode + 1 - (1 << 12)):
        out = printable("".join(map(chr, range(begin, begin + (1 << 12)))))
        assert not {unicodedata.category(c) for c in out} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}, begin
    for text in ORDINARY:
        assert printable(text) == text
    assert printable("a\x1b]0;x\x07\x9b31m\u202egpj.exe\u2066\u200b\ufeff\udcff\r\n\t") == (
        "a\\x1b]0;x\\x07\\x9b31m\\u202egpj.exe\\u2066\\u200b\\ufeff\\udcff\\r\\n\\t"
    )
    assert printable_lines("a\x1b\nb") == "a\\x1b\nb"
    assert paragraph("no file a\nsimclr: all is well\n  indented\n\nlast") == "no file a\n  simclr: all is well\n  indented\n\n  last"


def test_no_cell_is_a_formula_and_numbers_stay_numbers() -> None:
    formulas = ("=cmd|'/c calc'!A0", "+1+2", "-2+3", "@SUM(A1)", " =1", "＝1", "-", "-x", "+", "=")
    for text in (*formulas, *(f"'{formula}" for formula in formulas)):
        assert cell(text) == f"'{text}"  # one apostrophe more, which a reader takes off again
    for number in (-0.3, 1e-9, 0, -7, math.nan, -math.inf, np.float32(-1.5), True, None):
        assert cell(number) is number
    for text in (*ORDINARY, "-0.3", "+1e5", "-.5", "'quoted'", "x=1", "3-4"):
        assert cell(text) == text
    for text in ("\t=1", "\r=1", "\n=1"):
        assert cell(text) == printable(text)
    out = io.StringIO()
    csv.writer(out).writerow(map(cell, ("a;b", 'c"d', "e,f", -0.3, "=1")))
    assert next(csv.reader(io.StringIO(out.getvalue()))) == ["a;b", 'c"d', "e,f", "-0.3", "'=1"]


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("http://me:secret@host:5000/x", "http://…@host:5000/x"),
        ("--tracking-uri=https://host/?token=secret", "--tracking-uri=https://host/?token=…"),
        (
            "https://b/k?X-Amz-Credential=AKIA/s3&X-Amz-Signature=secret&X-Amz-Expires=60",
            "https://b/k?X-Amz-Credential=…&X-Amz-Signature=…&X-Amz-Expires=60",
        ),
        (
            "https://b/k?AWSAccessKeyId=AKIA&Signature=secret%3D&sv=1#access_token=secret",
            "https://b/k?AWSAccessKeyId=…&Signature=…&sv=…#access_token=…",
        ),
        ("with url: /search?max_results=1&page_token=secret (Caused by", "with url: /search?max_results=1&page_token=… (Caused by"),
        ("in header value: 'Bearer secret.secret\\n'", "in header value: 'Bearer …\\n'"),
        ("in header value: 'Basic c2VjcmV0'", "in header value: 'Basic …'"),
        ("https://h/?x&token=secret", "https://h/?x&token=…"),
        ("https://h/?&token=secret#&key=secret", "https://h/?&token=…#&key=…"),
        ("?flag&token=secret", "?flag&token=…"),
        ("?a=secret?b=secret", "?a=…?b=…"),
        ("Authorization: Token secret12", "Authorization: …"),
        ("{'Authorization': 'AWS4-HMAC-SHA256 Credential=secret/x, Signature=secret', 'a': 1}", "{'Authorization': '…', 'a': 1}"),
        ("bearer secret12, Token secret12, BASIC secret12", "bearer …, Token …, BASIC …"),
        ("X-Api-Key: secret", "X-Api-Key: …"),
        ("{'token': 'secret', 'n': 1}", "{'token': '…', 'n': 1}"),
        ('{\\"client_secret\\": \\"secret\\"} {"password":"se cret"}', '{\\"client_secret\\": \\"…\\"} {"password":"…"}'),
        ("AWS_SECRET_ACCESS_KEY=secret MLFLOW_TRACKING_PASSWORD=secret", "AWS_SECRET_ACCESS_KEY=… MLFLOW_TRACKING_PASSWORD=…"),
        ("https://u:p secret@h/x", "https://…@h/x"),
        ("http://h:5000 says: ask me@x, or http://[::1]:5000 a@b", "http://h:5000 says: ask me@x, or http://[::1]:5000 a@b"),
        ("the token expired; no such tokenizer: x", "the token expired; no such tokenizer: x"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("which data? give --data=DIR", "which data? give --data=DIR"),
        ("patterns:train=9,test=3", "patterns:train=9,test=3"),
    ],
)
def test_credentials_are_taken_out(text: str, without: str) -> None:
    assert redacted(text) == without
    assert redacted(without) == without  # run.json is compared by it


def test_no_text_takes_long() -> None:
    """Time in proportion to the length: with a square in it, each of these would take seconds to minutes."""
    began = time.process_time()
    for part in ("://", "a", "?a", "?a=", "token", 'token: \\"', "Authorization:", "bearer a", "://a:b ", "token ", "; "):
        text = part * (60_000 // len(part))
        for begin in ("", "?", "://"):
            redacted(begin + text)
        cell(text)
    assert time.process_time() - began < 3


def test_joiners_stay_where_they_show() -> None:
    for name in ("می\u200cخواهم", "क्\u200dष", "👩\u200d🔬", "🏳\ufe0f\u200d🌈", "👩🏽\u200d🚀"):
        assert printable(name) == name == cell(name)
    for hidden in ("pay\u200cpal", "\u200cمی", "می\u200c", "می\u200c\u200dخ", "می\u200c x", "кот\u200dик", "می\u200bخ"):
        assert printable(hidden).isprintable() and "\\u200" in printable(hidden)


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_no_cell_is_a_formula_where_another_sign_separates(quoting: Literal[0, 1]) -> None:
    """A spreadsheet that cuts lines at ; begins a quoted cell only behind one: quotes in the middle of a line protect nothing."""
    names = ('a;=HYPERLINK("http://e")', "a; +1", 'a;"=1"', "a;'-1", "a|@x", "b;;=1")
    for name in names:
        out = io.StringIO()
        csv.writer(out, quoting=quoting).writerow(map(cell, ("train", 3, name, -0.3, name)))
        for separator in ";|":
            for found in next(csv.reader(io.StringIO(out.getvalue()), delimiter=separator)):
                assert not re.match(r"[\s\"]*[=+@-]", found), (name, found)
        (_, _, back, *_) = next(csv.reader(io.StringIO(out.getvalue())))
        assert re.sub(r"([;|])'", r"\1", str(back)) == name  # one apostrophe more, which a reader takes off again
    assert cell("a;b|c") == "a;b|c"
