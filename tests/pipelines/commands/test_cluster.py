"""Cluster files that are made to be expensive."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.commands import cluster
from simclr.errors import UserError

LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (LAUGHS + "provider: {type: local}\n", r"the aliases in .* stand for [\d,]{30,} values"),
        ("provider: &a {type: local, inner: *a}\n", "stand for endlessly many values"),
        ("[" * 5_000, "is nested too deeply"),
    ],
)
def test_a_file_that_grows_when_it_is_read_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        cluster.read(tmp_path / "x.yaml")


def test_aliases_as_cluster_files_have_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("disk: &disk {size: 1}\nprovider: {type: local, head: *disk, worker: *disk}\n")
    assert cluster.read(tmp_path / "x.yaml")[1]["provider"]["worker"] == {"size": 1}
