"""docs/embeddings.md: its lines are run, in order, from a bucket to a neighbour and to trainings on the lists."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.runs.directory import Run
from pipelines.train import driver
from simclr.encoder.directory import write_encoder
from simclr.methods.simclr import build_model
from tests.support import command as commands
from tests.support.paths import ROOT
from tests.support.s3 import Proxy
from tests.support.small import TINY

INSTEAD = {
    "photos@champion": "encoder",
    "s3://lab/": "s3://photos/",
    "imagenet_resnet50": "patterns_tiny --encoder.depth 8 --train.batch-size 8 --train.steps 1 --workers 1",
    "--near-duplicates 0.95": "--near-duplicates 1",  # an encoder that nobody trained sees every two pictures as alike
    "--diverse 100": "--diverse 12",
    "finetune encoder": "finetune encoder --workers 1",
}


@pytest.mark.cluster  # for its time alone
def test_the_lines_of_the_page_run(
    simclr: commands.Run, s3: Proxy, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simclr.data.s3.store import Store

    jobs: list[driver.Job] = []

    def train(job: driver.Job, began: float) -> Run:
        jobs.append(job)
        return job.run

    monkeypatch.setattr(driver, "train", train)
    write_encoder(build_model(TINY).encoder.state_dict(), TINY, tmp_path / "encoder", {})
    for i in range(30):
        body = (photographs.parent / f"{i % 28:03}.jpg").read_bytes()  # the last two are copies
        Store().client.put_object(Bucket="photos", Key=f"photos/{'cat' if i % 2 else 'dog'}/{i:03}.jpg", Body=body)
    shutil.copy(photographs.parent / "005.jpg", tmp_path / "holiday.jpg")

    (block,) = re.findall(r"^```\n(simclr embed .*?)^```", (ROOT / "docs/embeddings.md").read_text(), re.MULTILINE | re.DOTALL)
    said: dict[str, str] = {}
    for line in block.splitlines():
        for old, new in INSTEAD.items():
            line = line.replace(old, new)
        words = shlex.split(line, comments=True)[1:]
        code, out, err = simclr(*words)
        assert code == 0, f"{line}: {err}"
        said[" ".join(word for word in words if word in ("neighbours", "--near-duplicates"))] = out
    assert "1  1.0000  cat/005.jpg  cat" in said["neighbours"]
    assert (tmp_path / "neighbours.html").read_text().count("<img ") == 11
    ids: list[Any] = [job.given["ids"].tolist() for job in jobs]
    assert len(ids) == 2 and len(ids[1]) == 12
    assert len(ids[0]) == 28
    assert "2 of 30 pictures repeat another" in said["--near-duplicates"]
