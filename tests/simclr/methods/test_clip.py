"""CLIP: loss and gradients are the authors' on any number of ranks; and the run that trains with it on pairs."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.evaluation import protocols
from pipelines.runs import home
from pipelines.tracking import registry
from simclr import loss, sense
from simclr.collectives import rank, world_size
from simclr.config import Encoder, Optim
from simclr.data import shards, tokens
from simclr.data.loader import batches
from simclr.data.manifest import read_manifest
from simclr.data.sources.open import open_source
from simclr.encoder.directory import read_towers, write_encoder
from simclr.encoder.weights import Weights
from simclr.errors import UserError
from simclr.evaluation.metrics import wilson
from simclr.evaluation.zero_shot import class_directions, similarities
from simclr.family import CLIP
from simclr.methods import clip as module
from simclr.methods.choice import shapes
from simclr.methods.method import Start
from simclr.methods.warm_start import warm_start
from simclr.networks.text import VOCABULARY, TextTransformer
from simclr.optim import dino_rule
from simclr.recipes import recipe
from simclr.train import train
from simclr.views.draw import Crop
from tests.conftest import Within
from tests.support.paths import GOLDEN
from tests.support.ranks import Ranks
from tests.support.small import TINY, mine, resumed
from tests.support.sources import source_of

pytest.importorskip("open_clip")
SMALL = CLIP(
    encoder=TINY.encoder,
    views=dataclasses.replace(TINY.views, area=(0.5, 1.0)),
    optim=Optim(name="adamw", base_lr=0.02, warmup_epochs=0.1, weight_decay=0.1, beta2=0.98),
    # 25 pairs divide over none of 2, 3 and 4 ranks.
    train=dataclasses.replace(TINY.train, batch_size=25, steps=4, checkpoint_every_steps=4),
    watch=TINY.watch,
    d_out=16,
    context=16,
    text_width=16,
    text_blocks=2,
    text_heads=2,
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 240 rendered patterns with captions, and 60 to test."""
    out = tmp_path_factory.mktemp("pairs") / "shards"
    shards.prepare(open_source("patterns:captions,train=240,test=60"), out, shards.Options(), 1, lambda count: None)
    return out


# ── Against the authors' numbers ───────────────────────────────────────────────────────────────────────────────────


def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "family/clip.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def share_of_authors(tag: str) -> tuple[float, Tensor, Tensor, Tensor]:
    """This rank's share of the loss, and its gradients: of all images and texts, 0 but for its own, and of the scale's logarithm."""
    g = golden()
    a, b = (mine(g[f"{name}_raw"].double()).requires_grad_() for name in ("image", "text"))
    log_scale = torch.log(g[f"{tag}_scale"].double()).requires_grad_()
    value = loss.clip(a, b, log_scale.exp().expand(len(a)), len(g["image_raw"]))
    value.backward()
    assert a.grad is not None and b.grad is not None and log_scale.grad is not None
    return value.item(), a.grad, b.grad, log_scale.grad


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("tag", ["s14", "s100"])
def test_the_loss_and_its_gradients_are_the_authors(tag: str, world: int, ranks: Ranks, within: Within) -> None:
    """Averaged over ranks, as DDP averages them: those of one process, of features and of the scale. On three ranks in unequal shares."""
    g = golden()
    found = ranks(world, share_of_authors, tag) if world > 1 else [share_of_authors(tag)]
    within("loss", abs(sum(value for value, *_ in found) / world - float(g[f"{tag}_one|loss"])), 1e-12)
    for at, name in ((1, "image"), (2, "text")):
        gradient = torch.cat([part[at] for part in found]) / world
        within("features' gradient", float((gradient - g[f"{tag}_one|grad_{name}_raw"]).abs().max()), 1e-12)
    scale = sum(part[3] for part in found) / world
    within("scale's gradient", float((scale - g[f"{tag}_one|grad_log_scale"]).abs().max()), 1e-12)


def test_the_wrong_gradients_are_told_apart() -> None:
    """What the authors' file has of gatherings without gradients is not what one process has, so that the test above would see it."""
    g = golden()
    right, half, lost = (g[f"s14_{kind}|grad_image_raw"].flatten(0, -2) for kind in ("one", "detached_full", "detached_local"))
    assert float((half / 2 - right).abs().max()) > 1e-3 and float((lost / 2 - right).abs().max()) > 1e-3


# ── Tokens, the text tower, zero-shot ──────────────────────────────────────────────────────────────────────────────


def test_tokens_are_clips() -> None:
    """Begin 49406, end 49407, lower case, and the end kept where a caption is cut."""
    found = tokens.tokens_of(("A photo of a cat", "a photo of a cat ", "", "cat " * 40), 8)
    assert found.shape == (4, 8) and found.dtype == np.int64 and VOCABULARY == 49_408
    assert found[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert (found[0] == found[1]).all() and found[2].tolist() == [49406, 49407] + 6 * [0]
    assert found[3].tolist() == [49406] + 6 * [2368] + [49407]
    assert tokens.tokens_of((), 8).shape == (0, 8)


def test_tokens_are_the_tokenizers_whatever_a_caption_has_in_it() -> None:
    """Captions are read word by word where that is the same. The tokenizer of comparison is as it comes: but for its own two words, ours
    differs in nothing."""
    odd = [
        "",
        " ",
        "a  b\tc\nd",
        "Don't, it'S we'll",
        "50 % off!!! <end of text>",
        "AT&amp;T &lt;b&gt;",
        "&amp;amp;amp;",
        "café ÉCOLE",
        "\u00c3\u00a9",
    ]
    odd += [
        "日本語 text",
        "\x1b[31mred\x1b[0m",
        "nul\x00nul",
        "non\u00a0break",
        "\u2018quoted\u2019",
        "A" * 300,
        "x-y_z/1.5e-3",
        "🙂 ok",
        "<|endoftext|>",
    ]
    draw = random.Random(0)
    letters = [chr(code) for code in range(32, 127)]
    odd += ["".join(draw.choices(letters + [" "] * 30, k=draw.randrange(60))) for _ in range(500)]
    theirs = type(tokens._tokenizer())()
    for context in (77, 12, 2):
        assert tokens.tokens_of(odd, context).tolist() == theirs(odd, context).tolist()


def test_an_end_within_a_caption_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text tower reads up to the first end. The word is one also after the tokenizer has forgotten what it saw."""
    given = ("before <end_of_text> after", "before &lt;End_Of_Text&gt; after", "<start_of_text> x")
    for _ in range(2):
        found = tokens.tokens_of(given, 32)
        assert ((found == 49407).sum(1) == 1).all() and ((found == 49406).sum(1) == 1).all()
        assert tokens._tokenizer().decode(found[1][1 : found[1].argmax()].tolist()).split() == ["before", "<end_of_text>", "after"]
        assert (found[0] == found[1]).all() and found.argmax(1).min() > 5
        tokens._tokenizer().cache.clear()
        tokens._of_word.cache_clear()
    assert 49407 in type(tokens._tokenizer())().encode(given[0])
    monkeypatch.setattr(tokens, "_WORDS", 50)
    said = [f"&amp; word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300)]
    assert tokens.tokens_of(said, 16).tolist() == type(tokens._tokenizer())()(said, 16).tolist()
    assert len(tokens._tokenizer().cache) < 60


# ── Prompts that say nothing ───────────────────────────────────────────────────────────────────────────────────────


def test_prompts_that_a_short_context_cuts_ahead_of_the_name_are_refused(pairs: Path, tmp_path: Path) -> None:
    """By several prompts one that tells classes apart is enough. Before a run begins, and before an evaluation computes anything."""
    classes = ("sea_lion", "fox", "sea_urchin")
    assert tokens.judged_prompts(classes, ("a {}",), 77) == ("", "")
    alike, _ = tokens.judged_prompts(classes, ("a photo of a {}",), 6)  # begin, four words, end
    assert "cannot tell 'sea_lion' from 'fox': with a context of 6 tokens" in alike and "as 'a photo of a fox'; give" in alike
    alike, _ = tokens.judged_prompts(classes, ("a {}",), 4)  # a, sea: cut between the words of two names
    assert "cannot tell 'sea_lion' from 'sea_urchin'" in alike
    alike, cut = tokens.judged_prompts(classes, ("a photo of a {}", "{}"), 6)
    assert not alike and cut == "3 of 6 prompts with a class's name are cut at 6 tokens, the context, as 'a photo of a sea lion'"
    same = tokens.judged_prompts(("a_b", "A b"), ("the {}",), 77)  # which no prompt mends
    assert same == ("", "zero-shot classification cannot tell 'a_b' from 'A b', which differ in case or _ alone")

    manifest, short = read_manifest(pairs), dataclasses.replace(SMALL, context=6, prompt="a photo of a {}")
    assert not any("prompt" in note for note in sense.notes(SMALL, manifest, 240))
    with pytest.raises(UserError, match="zero-shot classification cannot tell 'bricks' from 'checks'"):
        sense.notes(short, manifest, 240)
    said = sense.notes(short, manifest, 240, under_way=True)
    assert any("cannot tell 'bricks' from 'checks'" in note and "this run goes on all the same" in note for note in said)
    cut_short = dataclasses.replace(SMALL, context=6, prompt="a {} on a wall")
    assert any("10 of 10 prompts with a class's name are cut at 6 tokens" in note for note in sense.notes(cut_short, manifest, 240))

    network = module.Network(short)
    write_encoder(network.encoder.state_dict(), short, tmp_path / "encoder", {}, towers=network.towers.state_dict())
    settings = protocols.Settings(
        k=None, temperature=None, epochs=1, batch_size=None, resamples=1, limit=None, threads=1, published=tmp_path / "encoder"
    )
    with pytest.raises(UserError, match="zero-shot classification cannot tell 'bricks' from 'checks'"):
        protocols.require_texts(settings, manifest.classes)
    protocols.require_texts(dataclasses.replace(settings, prompts=("{} on a wall",)), manifest.classes)


def test_a_text_is_what_stands_up_to_its_end() -> None:
    """Attention is causal and the end's row is taken: what follows the end changes nothing, what precedes it does."""
    tower = TextTransformer(50, 9, 16, 2, 2).double()
    text = torch.tensor([[48, 3, 4, 49, 0, 0], [48, 3, 5, 49, 0, 0], [48, 3, 4, 49, 7, 7], [48, 3, 4, 49, 0, 0]])
    found = tower(text).detach()
    assert torch.equal(found[0], found[3]) and torch.allclose(found[0], found[2], rtol=0, atol=1e-12)
    assert float((found[0] - found[1]).abs().max()) > 1e-6
    assert torch.allclose(tower(text[:1, :4]).detach(), found[:1], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="3 heads do not divide a width of 16"):
        TextTransformer(50, 9, 16, 2, 3)


def test_class_directions_are_means_over_prompts() -> None:
    said: list[str] = []

    def texts(captions: list[str]) -> Tensor:
        said.extend(captions)
        return torch.tensor([[3.0, 0.0], [0.0, 5.0], [-2.0, 0.0], [-4.0, 0.0]])

    found = class_directions(("sea_lion", "fox"), ("a {}", "the {}."), texts)
    assert said == ["a sea lion", "the sea lion.", "a fox", "the fox."]
    half = math.sqrt(0.5)
    assert torch.allclose(found, torch.tensor([[half, half], [-1.0, 0.0]], dtype=torch.float64))
    cosines = similarities(torch.tensor([[2.0, 2.0], [-1.0, 0.5]]), found)
    assert cosines.argmax(1).tolist() == [0, 1] and cosines[0, 0] == pytest.approx(1.0)


# ── Runs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def losses(config: CLIP, data: str) -> tuple[list[float], dict[str, Tensor]]:
    reports = list(train(config, Start(Path(data))))
    return [r.metrics["train/loss"] for r in reports], {name: t.clone() for name, t in reports[-1].state.tensors.items()}


def test_any_number_of_ranks_trains_alike(ranks: Ranks, within: Within, pairs: Path) -> None:
    expected, state = losses(SMALL, str(pairs))
    assert math.log(25) - 0.5 < expected[0] < math.log(25) + 2 and shapes(SMALL).chance == math.log(25)
    for world in (2, 3, 4):
        found, weights = ranks(world, losses, SMALL, str(pairs))[0]
        within("loss", float(np.abs(np.subtract(found, expected)).max()), 1e-9)
        within("state", max(float((weights[name].double() - t.double()).abs().max()) for name, t in state.items()), 1e-7)


def test_a_batch_in_pieces_has_the_whole_batchs_gradient(within: Within, pairs: Path) -> None:
    """Of a ViT: there is no BatchNorm, whose statistics are a piece's own."""
    whole = dataclasses.replace(SMALL, encoder=Encoder(vit="micro", patch_px=8), train=dataclasses.replace(SMALL.train, batch_size=24))
    pieces = dataclasses.replace(whole, train=dataclasses.replace(whole.train, micro_batch=6))
    (a, state), (b, other) = losses(whole, str(pairs)), losses(pieces, str(pairs))
    within("loss", float(np.abs(np.subtract(a, b)).max()), 1e-9)
    within("state", max(float((state[name].double() - other[name].double()).abs().max()) for name in state), 1e-7)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(pairs: Path, tmp_path: Path) -> None:
    assert "model.log_scale" in resumed(SMALL, pairs, tmp_path, 2)


def test_the_scale_is_learnt_and_stays_within_its_bounds(pairs: Path) -> None:
    begun = math.log(1 / 0.07)
    moved = losses(SMALL, str(pairs))[1]["model.log_scale"].item()
    assert moved != pytest.approx(begun, abs=1e-4)
    highest = dataclasses.replace(SMALL, scale_most=1 / 0.07, optim=dataclasses.replace(SMALL.optim, base_lr=5.0))
    assert losses(highest, str(pairs))[1]["model.log_scale"].item() <= begun + 1e-6
    network = module.Network(SMALL)
    for begins, ends in ((-3.0, 0.0), (6.0, math.log(50.0)), (1.0, 1.0)):
        torch.nn.init.constant_(network.log_scale, begins)
        module.clamp(network, 50.0, {}, {}, 0)
        assert network.log_scale.item() == pytest.approx(ends)
    spared = [name for name, p in network.named_parameters() if not dino_rule(name, p)[0]]
    assert "log_scale" in spared and not any(name.endswith("_embed") for name in spared)


def test_an_image_meets_its_own_caption(pairs: Path) -> None:
    """Rows are those of the batch's ids, whoever holds them."""
    batch = next(batches(SMALL, pairs, 0, 0, 1, crops=(Crop(count=1, views=SMALL.views, distorted=False),)))
    names = ("bricks", "checks", "crosses", "diamonds", "dots", "grid", "rings", "stripes", "waves", "zigzag")
    assert len(batch.captions) == 25 and all(
        names[label] in text for label, text in zip(batch.labels.tolist(), batch.captions, strict=True)
    )
    rows = module.inputs_of(batch, slice(3, 7), (Crop(count=1, views=SMALL.views, distorted=False),), SMALL, torch.device("cpu"))
    assert rows["tokens"][0].tolist() == tokens.tokens_of(batch.captions[3:7], 16).tolist() and rows["views"].shape[:2] == (1, 4)


def ours(data: str) -> list[str]:
    """The captions of this rank's share of the first batch."""
    return list(next(batches(SMALL, Path(data), 0, rank(), world_size())).captions)


def test_every_rank_has_the_captions_of_its_images(ranks: Ranks, pairs: Path) -> None:
    assert [text for texts in ranks(3, ours, str(pairs)) for text in texts] == ours(str(pairs))


@pytest.mark.long
@pytest.mark.parametrize("shuffled", [False, True])
def test_classes_are_known_by_their_names_and_by_chance_from_shuffled_captions(shuffled: bool, tmp_path: Path) -> None:
    """Three epochs of the recipe: the lower end of the 95 % interval is at least three times chance, a tenth. With captions of other images
    the interval's lower end is below chance."""
    source = open_source("patterns:captions")
    if shuffled:
        items = list(source.items())
        order = np.random.default_rng(0).permutation(len(items))
        others = [dataclasses.replace(item, caption=items[at].caption) for item, at in zip(items, order, strict=True)]
        source = source_of(others, captioned=True)
    shards.prepare(source, tmp_path / "pairs", shards.Options(), 1, lambda count: None)
    config = recipe("patterns_clip")
    settings = dataclasses.replace(config.train, epochs=3.0)
    config = dataclasses.replace(config, train=settings, watch=dataclasses.replace(config.watch, every_epochs=0, queries=1000))
    scores = [report.metrics for report in train(config, Start(tmp_path / "pairs"))][-1]
    low, high = wilson(scores["eval/zero_shot_top1"], 1000)
    assert (low < 0.1 < high + 0.05) if shuffled else low >= 0.3, scores


def test_a_run_begins_with_given_weights(pairs: Path, tmp_path: Path) -> None:
    begun = losses(dataclasses.replace(SMALL, seed=5), str(pairs))[1]
    encoder = {name.removeprefix("model.encoder."): t for name, t in begun.items() if name.startswith("model.encoder.")}
    state, said = warm_start(SMALL, Weights(encoder=encoder), ("a", "b"), "there")
    assert "encoder tensors" in said and all(torch.equal(state.tensors[f"model.encoder.{name}"], t) for name, t in encoder.items())
    assert said.endswith("log_scale and towers: new") and state.tensors["model.log_scale"].item() == pytest.approx(math.log(1 / 0.07))


def test_an_extended_run_has_the_learnt_temperature(pairs: Path) -> None:
    """It is a parameter by itself, in no module of the network."""
    learnt = dict(losses(dataclasses.replace(SMALL, seed=5), str(pairs))[1])
    learnt["model.log_scale"] = torch.tensor([math.log(80.0)])
    encoder = {name.removeprefix("model.encoder."): t for name, t in learnt.items() if name.startswith("model.encoder.")}
    rest = {name: t for name, t in learnt.items() if name.startswith("model.") and not name.startswith("model.encoder.")}
    state, said = warm_start(SMALL, Weights(encoder=encoder, method="clip", rest=rest), ("a", "b"), "there")
    assert said.endswith("log_scale and towers: taken") and state.tensors["model.log_scale"].exp().item() == pytest.approx(80)
    assert all(torch.equal(state.tensors[name], t) for name, t in rest.items())


def test_what_is_published_reads_class_names(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The towers come back from the directory, in chunks as in one; and whoever lists a published encoder's files has theirs."""
    tensors = {name.removeprefix("model."): t for name, t in losses(SMALL, str(pairs))[1].items()}
    parts = [{n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")} for part in ("encoder", "towers")]
    write_encoder(parts[0], SMALL, tmp_path / "encoder", {}, towers=parts[1])
    towers, config = read_towers(tmp_path / "encoder")
    assert config == SMALL
    whole = module.texts_of(towers, 16, ["a cat", "rings", "dots"])
    monkeypatch.setattr(module, "_TEXTS", 2)
    assert torch.allclose(module.texts_of(towers, 16, ["a cat", "rings", "dots"]), whole, rtol=0, atol=1e-5)
    assert "towers.safetensors" in registry.FILES and "encoder/towers.safetensors" in home._FILES
    write_encoder(parts[0], TINY, tmp_path / "other", {})
    with pytest.raises(UserError, match="has no text tower"):
        read_towers(tmp_path / "other")


@pytest.mark.parametrize("absent", [False, True])
def test_a_run_that_cannot_read_captions_is_refused_before_it_begins(
    pairs: Path, patterns: Path, monkeypatch: pytest.MonkeyPatch, absent: bool
) -> None:
    if absent:
        monkeypatch.setattr(sense, "has", lambda name: False)
    with pytest.raises(UserError, match="is not installed; add it" if absent else "the shards have no captions"):
        sense.notes(SMALL, read_manifest(pairs if absent else patterns), 240)


def test_data_without_captions_is_refused(patterns: Path) -> None:
    with pytest.raises(UserError, match=r"has no captions, and CLIP trains on pairs; `simclr prepare --captions auto`"):
        next(train(SMALL, Start(patterns)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.001}, "temperature is 0.001; expected 1 / scale_most = 0.01 to 1"),
        ({"context": 2}, "context is 2; expected 3 to 1024 tokens"),
        ({"text_heads": 3}, "text_width is 16; expected a multiple of text_heads, 3"),
        ({"prompt": "a photo"}, "expected a text with {} where the class stands"),
        ({"scale_most": 0.5}, "scale_most is 0.5; expected at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        dataclasses.replace(SMALL, **changes)
    assert words in str(refused.value)
