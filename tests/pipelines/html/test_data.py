"""The report's section about the data: the same table that `prepare` says and the manifest keeps."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from pipelines.commands import report
from pipelines.html.data import data_table
from pipelines.html.page import render
from pipelines.runs.directory import open_run
from simclr.data.manifest import read_manifest
from simclr.data.sources.reading import Split, Understood
from tests.support.small import TINY

UNDERSTOOD = Understood(
    splits={
        "train": Split(Counter({"<cat>": 1_200, "dog & co": 3_000, None: 800}), (("train/<cat>/1.jpg", "<cat>"), ("2.jpg", None))),
        "test": Split(Counter(), ()),
    },
    how_split="folder: train = <train>",
    how_labelled="the folder",
    notes=("one <note>", "another"),
    counted=True,
    ignored=Counter({".xmp": 1_300}),
).to_dict()


def cells(table: str) -> list[list[str]]:
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]


def test_the_rows_are_those_that_prepare_says_and_names_are_escaped() -> None:
    table = data_table(UNDERSTOOD)
    assert cells(table) == [
        ["split", "images", "labelled", "classes", "smallest class", "largest class"],
        ["train", "5,000", "84 %", "2", "&lt;cat&gt; (1,200)", "dog &amp; co (3,000)"],
        ["test", "0", "0 %", "0", "–", "–"],
    ]
    assert dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", table)) == {
        "splits": "folder: train = &lt;train&gt;",
        "classes": "the folder",
        "train, as": "train/&lt;cat&gt;/1.jpg → &lt;cat&gt;; 2.jpg → no class",
        "left out": "1,300 .xmp",
        "notes": "one &lt;note&gt;; another",
    }
    assert "<cat>" not in table and "<note>" not in table


def test_a_share_just_below_the_whole_is_not_the_whole() -> None:
    split = UNDERSTOOD["splits"]["train"] | {"images": 1_000, "labelled": 999}
    assert "<td>99.9 %</td>" in data_table(UNDERSTOOD | {"splits": {"train": split}})


def test_shards_of_before_have_no_table() -> None:
    assert data_table({}) == ""


def test_the_report_of_a_run_has_the_table_of_its_shards(patterns: Path, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", "patterns_tiny", TINY, patterns)
    run.save()
    assert (found := report.gather(run).understood) == read_manifest(patterns).understood
    page = report.report(report.Args(run.path)).read_text()
    assert data_table(found) in page and '<th scope="row">train</th><td>240</td><td>100 %</td><td>10</td>' in page
    assert "The data" in page and "The data" not in render(report.gather(run).__class__(**vars(report.gather(run)) | {"understood": {}}))
