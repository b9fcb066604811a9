"""Publishing on a played Hub, and reading from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.runs.directory import Run as RunDirectory
from pipelines.runs.directory import load_run
from pipelines.tracking import hub as publishing
from pipelines.tracking.card import write_card
from pipelines.tracking.record import Record
from simclr import load_encoder
from simclr.encoder import hub as reading
from simclr.encoder.directory import write_encoder
from simclr.errors import UserError
from simclr.recipes import recipe
from tests.pipelines.tracking.test_trust import a_run, an_encoder
from tests.simclr.encoder.test_timm import an_encoder as a_resnet
from tests.support.command import Run, refused
from tests.support.hub import TOKEN, Hub, oid
from tests.support.paths import ROOT

WHY = "huggingface_hub, of the extras `hub` and `dev`, is not installed"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """It speaks HTTP and LFS. huggingface_hub's other way to send files, Xet, is a protocol of its own."""
    pytest.importorskip("huggingface_hub", reason=WHY)
    from huggingface_hub import constants

    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.uri)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.uri + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.stop()


@pytest.fixture
def run(tmp_path: Path, patterns: Path) -> RunDirectory:
    run = load_run(a_run(tmp_path / "run", patterns, "", ""))
    an_encoder(run.encoder)
    return run


def test_a_run_is_published_and_read(simclr: Run, hub: Hub, run: RunDirectory, tmp_path: Path) -> None:
    code, out, said = simclr("publish", run.path, "--hub", "team/photos", "--licence", "MIT")
    assert (code, out) == (0, f"{hub.uri}/team/photos/commit/{oid('team/photos', 0)}\n"), said
    assert f"{hub.uri}/team/photos is new and private; its settings there make it public" in said and hub.private == {"team/photos"}
    (files,) = hub.repositories["team/photos"]
    assert sorted(files) == ["README.md", "config.json", "encoder.safetensors"]  # a small network: timm has none
    assert files["encoder.safetensors"] == (run.encoder / "encoder.safetensors").read_bytes()
    head, card = files["README.md"].decode().removeprefix("---\n").split("\n---\n", 1)
    for line in (
        "license: mit",
        "library_name: simclr",
        "pipeline_tag: image-feature-extraction",
        "- simclr",
        "model-index:",
        "value: 0.5",
    ):
        assert line in [row.strip() for row in head.split("\n")], line
    assert (
        'load_encoder("hf://team/photos")' in card
        and card.startswith("\n# team/photos\n")
        and "DIR" not in card
        and "mlflow" not in card
        and "timm has no network with" in card
    )

    hub.heard.clear()
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 36, 3), dtype=np.uint8)
    torch.testing.assert_close(load_encoder("hf://team/photos").embed(images), load_encoder(run.encoder).embed(images), rtol=0, atol=0)
    assert {heard.rpartition("/")[2] for heard in hub.heard if "/resolve/" in heard} == {"encoder.safetensors", "config.json"}


def test_a_later_publication_is_one_commit_that_leaves_nothing_of_the_earlier(hub: Hub, run: RunDirectory, tmp_path: Path) -> None:
    published = a_resnet(depth=50, cifar_stem=False)
    write_encoder(published.encoder.state_dict(), recipe("patterns_tiny"), tmp_path / "large", {}, head={"w": torch.ones(1)})
    (tmp_path / "large" / "config.json").write_text(json.dumps({"schema": 1, **published.config}))
    for encoder in (tmp_path / "large", run.encoder):
        write_card(encoder, "hf://team/photos", Record(), "free for research")
        publishing.push(encoder, "team/photos", Record(), "free for research")
    first, second = hub.repositories["team/photos"]
    assert set(first) - set(second) == {"head.safetensors", "model.safetensors"}
    about = json.loads(first["config.json"])
    assert (about["architecture"], about["num_features"]) == ("resnetv2_50", 2048) and about["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert b"license: other\nlicense_name: free for research\n" in first["README.md"] and b"model-index" not in first["README.md"]
    at = load_encoder(f"hf://team/photos@{oid('team/photos', 0)}")
    assert (at.d_h, load_encoder("hf://team/photos").d_h) == (2048, 64)

    # timm by its own command, in a process whose environment says where the Hub is.
    pytest.importorskip("timm", reason="timm, of the extra `dev`, is not installed")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    code = (
        "import timm, torch; m = timm.create_model('hf-hub:team/photos@%s', pretrained=True, num_classes=0).eval()\n"
        "x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
        "torch.save(m(x).detach(), 'h.pt')\n"
    )
    env = os.environ | {"HF_ENDPOINT": hub.uri, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code % oid("team/photos", 0)], env=env, cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "h.pt", weights_only=True), at(x), rtol=1e-4, atol=1e-5)  # another order of sums
    assert list((tmp_path / "home").rglob("model.safetensors"))


def test_commands_read_it_too_also_without_a_connection(
    simclr: Run, hub: Hub, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simclr("publish", run.path, "--hub", "team/photos")
    Image.fromarray(np.arange(3 * 40 * 36, dtype=np.uint8).reshape(40, 36, 3)).save(tmp_path / "a.png")
    code, _, said = simclr("embed", "hf://team/photos", tmp_path / "a.png", "--out", tmp_path / "features.npz")
    assert code == 0 and np.load(tmp_path / "features.npz")["features"].shape[1] == 64, said
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.heard.clear()
    assert load_encoder("hf://team/photos").d_h == 64 and not hub.heard


def test_what_cannot_be_had_is_one_sentence(hub: Hub, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.repositories |= {"team/other": [{"README.md": b"# m\n", "config.json": b"{}"}], "team/gated": [{}], "team/closed": [{}]}
    hub.gated, hub.private = {"team/gated"}, {"team/closed"}
    for address, sentence in (
        ("hf://team/none", r"there is no http.*/team/none, or it is private: .* `hf auth login`"),
        ("hf://team/gated", r"/team/gated is gated: ask for access on its page"),
        ("hf://team/other@v2", r"/team/other has no revision 'v2'"),
        ("hf://team/other", r"/team/other holds no encoder of simclr's: it has no encoder\.safetensors"),
        ("hf://team", "is no address on the Hub; expected hf://ORG/NAME"),
        ("hf://../etc", "is no repository on the Hub"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_encoder(address)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(UserError, match=r"there is no .*/team/closed, or it is private"):
        load_encoder("hf://team/closed")
    write_card(run.encoder, "m", Record(), "MIT")
    with pytest.raises(UserError, match=r"/team/new .* log in with `hf auth login`") as refusal:
        publishing.push(run.encoder, "team/new", Record(), "MIT")
    assert "hf_of" not in str(refusal.value) and "team/new" not in hub.repositories
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"\$HF_HUB_OFFLINE is set, and team/none is not in the cache"):
        load_encoder("hf://team/none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(UserError, match=r"the Hub cannot be reached \(ConnectionRefusedError\), and team/none is not in the cache"):
        load_encoder("hf://team/none")


def test_without_the_package_the_extra_is_named(run: RunDirectory, simclr: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"not installed; add it with `pip install 'simclr-cluster\[hub\]'`"):
        load_encoder("hf://team/photos")
    refused(simclr("publish", run.path, "--hub", "team/photos"), "huggingface_hub, which hf:// needs, is not installed")


def test_flags_of_the_registry_are_not_taken_in_silence(simclr: Run, run: RunDirectory) -> None:
    refused(simclr("publish", run.path, "--hub", "team/photos", "--name", "photos"), "leave out --name")
    for name in ("photos", "a/b/c", "../x", "a/b--c", "a /b"):
        refused(simclr("publish", run.path, "--hub", name), r"no repository on the Hub; expected ORG/NAME")
    assert reading.repository("team/photos-v1.2_x") == "team/photos-v1.2_x"
