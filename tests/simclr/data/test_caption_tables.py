"""Captions as people write them down: dialects of tables, encodings, columns, several texts; what is read, said and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from simclr.data.sources.name_tables import decoded, read_table
from simclr.data.sources.open import open_source
from simclr.data.sources.portions import portions, reader
from simclr.data.sources.reading import Reading
from simclr.data.sources.source import Source
from simclr.errors import UserError
from tests.simclr.data.test_archives import packed
from tests.simclr.data.test_captions import AUTO, png


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pictures, 0.png to 2.png."""
    (tmp_path / "photos").mkdir()
    for shade in range(3):
        (tmp_path / f"photos/{shade}.png").write_bytes(png(shade))
    return tmp_path / "photos"


def opened(root: Path, name: str, text: str | bytes, **given: Any) -> Source:
    table = root.parent / name
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(str(root), Reading(captions=str(table), **given))


def said(source: Source) -> dict[str, str]:
    return {item.name: item.caption for item in source.items() if item.caption}


def notes(source: Source) -> str:
    return "\n".join(source.understood["notes"])  # type: ignore[arg-type]


# ── Dialects ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "file,caption\n0.png,a cat\n1.png,a cat, a dog and a mouse\n", "a.csv, line 3 has 3 cells, and its head has 2"),
        ("a.csv", 'file,caption\n0.png,"a cat\n1.png,"a dog"\n', "line 2: ',' expected after '\"'; a quotation mark there is not closed"),
        ("a.csv", 'file,caption\n0.png,one\n1.png,"a dog\n2.png,two\n', "line 3: unexpected end of data; a quotation mark there is not"),
        (
            "a.csv",
            'file,caption\n0.png,"open\n1.png,one\n2.png,a tube of 5"\n',
            "line 2: a quotation mark there closes only behind '2.png,",
        ),
        ("a.csv", 'caption,file\n"open,0.png\none,1.png\n5",2.png\n', "line 2: a quotation mark there closes only behind '5'"),
        ("a.tsv", "file\tcaption\n0.png\ta cat\ta dog\n", "a.tsv, line 2 has 3 cells, and its head has 2; a caption with a tab in it"),
        ("a.csv", "file,caption,Caption\n0.png,a,b\n", "a.csv has two columns caption, and nobody says which counts"),
    ],
)
def test_a_row_that_would_be_cut_or_merged_is_refused(root: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        opened(root, name, text)
    assert words in str(refused.value)


def test_a_quoted_csv_may_have_commas_and_lines_in_a_caption(root: Path) -> None:
    source = opened(root, "a.csv", 'file;caption\r\n0.png;"first; or\nsecond, ""quoted"""\r\n1.png;a 5" screen, in use\r\n')
    assert said(source) == {"0.png": 'first; or\nsecond, "quoted"', "1.png": 'a 5" screen, in use'}


def test_a_tsv_is_quoted_where_all_of_it_is(root: Path) -> None:
    """As pandas writes it; with one mark that is not closed, or that closes only rows later, marks are letters."""
    quoted = 'file\tcaption\n0.png\t"two ""quoted"" words"\n1.png\t"first\nsecond"\n2.png\tplain "marks" within\n'
    assert said(opened(root, "a.tsv", quoted)) == {"0.png": 'two "quoted" words', "1.png": "first\nsecond", "2.png": 'plain "marks" within'}
    raw = 'file\tcaption\n0.png\t"so he said\n1.png\t"whole"\n2.png\ta tube of 5"\n'
    assert said(opened(root, "b.tsv", raw)) == {"0.png": '"so he said', "1.png": '"whole"', "2.png": 'a tube of 5"'}
    met = 'file\tcaption\n0.png\t"so he said\n1.png\tone\n2.png\ta tube of 5"\n'
    assert said(opened(root, "c.tsv", met)) == {"0.png": '"so he said', "1.png": "one", "2.png": 'a tube of 5"'}


def test_rows_with_fewer_cells_are_counted(root: Path) -> None:
    source = opened(root, "a.csv", "file,caption,rating\n0.png,a cat,3\n1.png,a dog\n2.png\n")
    assert said(source) == {"0.png": "a cat", "1.png": "a dog"}
    assert "2 rows have fewer cells than the head of" in notes(source) and "a.csv, as line 3" in notes(source)


# ── Columns ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_that_name_different_pictures_are_refused(root: Path) -> None:
    """A running id whose numbers are the names of other pictures, too."""
    table = "image_id,image_path,caption\n0,./1.png,one\n1,./2.png,two\n2,./0.png,zero\n"
    with pytest.raises(UserError) as refused:
        opened(root, "a.csv", table)
    assert "line 2: the column image_path names 1.png, and image_id names 0.png" in str(refused.value)
    assert "--caption-columns image_path caption, or image_id caption" in str(refused.value)
    with pytest.raises(UserError, match=r"line 2: the column image_path names 1.png, and image_id names 0.png"):
        opened(root, "a.csv", table.replace("./", "/elsewhere/photos/"))
    source = opened(root, "a.csv", table, caption_columns=("image_path", "caption"))
    assert said(source) == {"1.png": "one", "2.png": "two", "0.png": "zero"}


def test_the_column_that_names_pictures_is_taken_and_said(root: Path) -> None:
    table = "image_id,name,image_path,title\n" + "".join(f"{100 + i},cat {i},./{i}.png,say {i}\n" for i in range(3))
    source = opened(root, "a.csv", table + "103,cat,7.png,nobody\n")
    assert said(source) == {f"{i}.png": f"say {i}" for i in range(3)}
    assert "captions are the column title of" in notes(source)
    assert "a.csv, by image_path (path); 1 of its 4 names are those of no picture, or of several" in notes(source)
    by_id = opened(root, "b.jsonl", "".join(json.dumps({"image_id": i, "caption": f"say {i}"}) + "\n" for i in range(3)))
    assert said(by_id) == said(source) and "by image_id (path without ending); 0 of its 3 names" in notes(by_id)


# ── Encodings ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_bad_byte_leaves_the_other_captions_as_they_are(root: Path) -> None:
    source = opened(root, "a.csv", "file,caption\n0.png,größer\n1.png,caf".encode() + b"\xe9\n" + "2.png,日本\n".encode())
    assert said(source) == {"0.png": "größer", "1.png": "caf\ufffd", "2.png": "日本"}
    assert "1 caption is not UTF-8 in" in notes(source) and "a.csv, as that of 1.png" in notes(source)


@pytest.mark.parametrize(("encoding", "note"), [("latin-1", "a.csv is not UTF-8 and was read as Latin-1"), ("utf-16", "")])
def test_a_whole_table_may_be_latin_1_or_utf_16(root: Path, encoding: str, note: str) -> None:
    source = opened(root, "a.csv", "file,caption\n0.png,größer\n1.png,café\n2.png,plain\n".encode(encoding))
    assert said(source) == {"0.png": "größer", "1.png": "café", "2.png": "plain"}
    assert note in notes(source) and ("Latin-1" in notes(source)) is bool(note)


def test_a_text_that_is_cut_within_a_letter_stays_utf_8() -> None:
    """As by a limit of bytes; and one bad byte among letters. A single text is a whole file of WebDataset."""
    assert decoded("中文说明".encode()[:-1], "replace") == "中文说�"
    assert decoded("ein größerer Hund, schön".encode()[:-1] + b"\xff", "replace") == "ein größerer Hund, schö�"
    assert [decoded(text.encode("latin-1")) for text in ("café", "größer", "ein größerer Hund")] == ["café", "größer", "ein größerer Hund"]


def test_a_separator_at_the_end_and_columns_that_nobody_reads_are_no_reason(root: Path) -> None:
    assert said(opened(root, "a.csv", "file,caption\n0.png,one,\n1.png,two,,\n")) == {"0.png": "one", "1.png": "two"}
    twice = "URL,file,caption,url\na,0.png,one,b\n"
    assert said(opened(root, "b.csv", twice)) == {"0.png": "one"}
    named = {"caption_columns": ("file", "caption")}
    assert said(opened(root, "c.csv", "title,file,caption,title\na,0.png,one,b\n", **named)) == {"0.png": "one"}
    with pytest.raises(UserError, match="has two columns title, and nobody says which counts"):
        opened(root, "d.csv", "title,file,caption,title\na,0.png,one,b\n")


def test_names_of_classes_that_differ_in_a_bad_byte_stay_two() -> None:
    table = "0.jpg,größer\n1.jpg,日本\n2.jpg,naïve\n".encode() + b"3.jpg,caf\xe9\n4.jpg,caf\xe8\n"
    found = read_table("a.csv", table, ("label",))
    assert found is not None and len(set(found.values.values())) == 5 and found.values["0.jpg"] == "größer"
    latin = read_table("a.csv", b"0.jpg,gr\xf6\xdfer\n1.jpg,plain\n", ("label",))
    assert latin is not None and latin.values == {"0.jpg": "größer", "1.jpg": "plain"}


def test_texts_of_webdataset_may_be_latin_1_or_utf_16(tmp_path: Path) -> None:
    texts = ["größer".encode("latin-1"), "日本 と".encode("utf-16"), "café".encode(), b"plain"]
    files = {f"{i}.jpg": png(i) for i in range(4)} | {f"{i}.txt": text for i, text in enumerate(texts)}
    packed(tmp_path / "a.tar", dict(sorted(files.items())))
    source = open_source(str(tmp_path / "a.tar"), AUTO)
    assert list(said(source).values()) == ["größer", "日本 と", "café", "plain"]
    assert "2 captions are not UTF-8 in" in notes(source) and "as that of 0.jpg" in notes(source)
    assert "not UTF-8" not in notes(open_source(str(tmp_path / "a.tar")))


@pytest.mark.parametrize("lists", [False, True])
def test_texts_of_parquet_may_be_no_utf_8(tmp_path: Path, lists: bool) -> None:
    column = pyarrow.array([b"caf\xe9", "größer".encode(), b"plain"]).view(pyarrow.string())
    if lists:
        column = pyarrow.ListArray.from_arrays([0, 1, 2, 3], column)
    pyarrow.parquet.write_table(pyarrow.table({"image": [png(i) for i in range(3)], "text": column}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), AUTO)
    assert list(said(source).values()) == ["café", "größer", "plain"] and "1 caption is not UTF-8 in" in notes(source)


def test_half_a_pair_of_surrogates_is_a_letter_that_is_missing(root: Path) -> None:
    lines = '{"file": "0.png", "caption": "cute \\ud83d"}\n{"file": "1.png", "caption": "cute \\ud83d\\ude00"}\n'
    source = opened(root, "a.jsonl", lines)
    assert said(source) == {"0.png": "cute \ufffd", "1.png": "cute 😀"} and "as that of 0.png" in notes(source)
    json.dumps(source.understood, ensure_ascii=False).encode()


def test_json_lines_end_at_line_feeds_alone(root: Path) -> None:
    rows = [{"file": f"{i}.png", "caption": f"a{sign}b"} for i, sign in enumerate("\u2028\u0085\x0b")]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert said(opened(root, "a.jsonl", text.replace("\\u000b", " "))) == {"0.png": "a\u2028b", "1.png": "a\u0085b", "2.png": "a b"}
    labels = "\n".join(
        json.dumps({"file_name": f"{i}.png", "label": "ab"[i % 2], "said": "x\u2028y"}, ensure_ascii=False) for i in range(3)
    )
    (root.parent / "labels.jsonl").write_text(labels)
    labelled = open_source(str(root), Reading(labels=str(root.parent / "labels.jsonl")))
    assert [item.label for item in labelled.items()] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "a.jsonl, line 2: this is not one object of JSON a line"),
        ('{"file": "1.png", "caption": {"en": "a cat"}}', "a.jsonl, line 2 has {'en': 'a cat'} for a caption; expected a text or a list"),
        ('{"file": "1.png", "caption": NaN}', "line 2 has nan for a caption"),
        ('{"file": "1.png", "caption": ["a", 3]}', "line 2 has ['a', 3] for a caption"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(root: Path, line: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        opened(root, "a.jsonl", '{"file": "0.png", "caption": "a cat"}\n' + line)
    assert words in str(refused.value)


# ── Several ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lists_of_several_texts_are_counted_and_their_first_counts(root: Path) -> None:
    rows = [("0.png", [" ", "b", None]), ("1.png", ["one", " one "]), ("2.png", ["first", "second"])]
    source = opened(root, "a.jsonl", "".join(json.dumps({"file": name, "captions": texts}) + "\n" for name, texts in rows))
    assert said(source) == {"0.png": "b", "1.png": "one", "2.png": "first"}
    assert "has several captions for 1 picture, as 2.png; the first one counts" in notes(source)
    table = pyarrow.table({"image": [png(i) for i in range(3)], "captions": [texts for _, texts in rows]})
    pyarrow.parquet.write_table(table, root.parent / "a.parquet")
    source = open_source(str(root.parent / "a.parquet"), AUTO)
    assert list(said(source).values()) == ["b", "one", "first"] and "has several captions for 1 picture" in notes(source)


def test_two_ways_to_write_a_name_are_one(root: Path) -> None:
    source = opened(root, "a.csv", "file,caption\n./0.png,first\n0.png,second\n1.png,one\n")
    assert said(source) == {"0.png": "first", "1.png": "one"}
    assert "has several captions for 1 picture, as 0.png; the first one counts" in notes(source)


# ── A folder as img2dataset leaves it ──────────────────────────────────────────────────────────────────────────────


def test_archives_beside_tables_without_pictures_are_read(tmp_path: Path) -> None:
    for shard in range(2):
        files = {}
        for i in range(3):
            key = f"{shard:05}{i:04}"
            files |= {f"{key}.jpg": png(10 * shard + i), f"{key}.json": b'{"width": 8}', f"{key}.txt": b"number %d" % (10 * shard + i)}
        packed(tmp_path / f"laion/{shard:05}.tar", files)
        about = pyarrow.table({"url": ["http://a"] * 3, "caption": ["x"] * 3, "key": [f"{shard:05}{i:04}" for i in range(3)]})
        pyarrow.parquet.write_table(about, tmp_path / f"laion/{shard:05}.parquet")
        (tmp_path / f"laion/{shard:05}_stats.json").write_text("{}")
    source = open_source(str(tmp_path / "laion"), AUTO)
    assert sorted(said(source).values()) == sorted(f"number {10 * shard + i}" for shard in range(2) for i in range(3))
    assert "00000.parquet and 1 other tables: left out, without a column of pictures; the archives beside them are read" in notes(source)
    for path in (tmp_path / "laion").glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="has no column of pictures, only url, caption, key"):
        open_source(str(tmp_path / "laion"))


def test_another_process_reads_nothing_beside_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its portions carry classes and captions."""
    files = {}
    for i in range(6):
        files |= {f"{i}.cls": b"ab"[i % 2 :][:1], f"{i}.jpg": png(i), f"{i}.txt": b"number %d" % i}
    packed(tmp_path / "s/000000.tar", files)
    packed(tmp_path / "s/000001.tar", {f"1{name}": data for name, data in files.items()})
    braces = str(tmp_path / "s/{000000..000001}.tar")
    for spec in (str(tmp_path / "s"), str(tmp_path / "s/000000.tar"), braces):
        source = open_source(spec, AUTO)
        expected = [(item.name, item.label, item.caption, item.data) for item in source.items()]
        assert expected[3][1:3] == ("b", "number 3")
        with monkeypatch.context() as patch:
            patch.setattr("simclr.data.sources.webdataset._class", None)  # whoever reads one calls this
            read = reader(spec, None, source.identity)
            found = [item for portion in portions(source, 4) for item in read(portion)]
        assert [(item.name, item.label, item.caption, item.data) for item in found] == expected
