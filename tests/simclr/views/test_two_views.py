"""Views against the official code's pixels and crop boxes (tests/golden: TensorFlow 2.21 on fixed inputs)."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms import RandomResizedCrop

from simclr import keyed
from simclr.config import Views
from simclr.recipes import recipe
from simclr.views import draw, ops, two_views
from tests.conftest import Within
from tests.support.paths import GOLDEN


def planar(image: np.ndarray) -> torch.Tensor:
    return torch.tensor(image).permute(2, 0, 1)[None].double()


def test_colour_and_blur_equal_the_official_pixels(within: Within) -> None:
    data = np.load(GOLDEN / "colour_and_blur.npz")
    seen = set()
    for key in data.files:
        parts = key.split("|")
        if len(parts) == 1 or parts[1] in ("input", "brightness_v1_additive"):
            continue
        image, operation = parts[:2]
        if image.startswith("blur224"):  # 224 px, kernel 22; every 16th pixel is kept
            x = planar(np.random.RandomState(int(data["blur224_input_seed"])).rand(224, 224, 3))
            blurred = ops.gaussian_blur(x, torch.tensor([float(operation)], dtype=torch.float64))[:, :, ::16, ::16]
            within("blur at 224 px", float((blurred - planar(data[key])).abs().max()), 2e-3)
            seen.add("blur224")
            continue
        x = planar(data[f"{image}|input"])
        if operation == "grey":
            ours = ops.grey(x).expand(-1, 3, -1, -1)
        elif operation == "blur":
            ours = ops.gaussian_blur(x, torch.tensor([float(parts[2])], dtype=torch.float64))
        else:
            factor = torch.tensor(float(parts[2]), dtype=torch.float64).view(1, 1, 1, 1)
            ours = ops._APPLY[operation](x, factor)
        within(operation, float((ours - planar(data[key])).abs().max()), 2e-3)
        seen.add(operation)
    assert seen == {"brightness", "contrast", "saturation", "hue", "grey", "blur", "blur224"}


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 96])
def test_resize_equals_the_official_one(within: Within, kernel: str, size: int) -> None:
    data = np.load(GOLDEN / "resize.npz")
    x = planar(data["input"])
    box = torch.tensor([[0, 0, x.shape[2], x.shape[3]]])
    ours = ops.crop_resize(x, box, size, kernel)  # type: ignore[arg-type]
    expected = planar(data[f"{size}x{size}|{kernel}"]).clamp(0, 1)
    within(kernel, float((ours - expected).abs().max()), 2e-3)


def test_crop_boxes_have_the_official_distribution(within: Within) -> None:
    golden = json.loads((GOLDEN / "crops.json").read_text())["random_crop"]
    ids = np.arange(20_000)
    boxes = draw.crop_boxes(Views(), 3, 1, ids, np.tile([375, 500], (len(ids), 1))).reshape(-1, 4)
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 375).all() and (left + width <= 500).all()
    levels = golden["quantile_levels"]
    ours = {
        "area_fraction": height * width / (375 * 500),
        "aspect_w_over_h": width / height,
        "centre_x_fraction": (left + width / 2) / 500,
        "centre_y_fraction": (top + height / 2) / 375,
    }
    for name, values in ours.items():
        within(f"quantiles of {name}", float(np.abs(np.quantile(values, levels) - golden[name]).max()), 0.012)
    within("mean area", abs(ours["area_fraction"].mean() - golden["mean_area"]), 0.005)


def test_crop_boxes_have_torchvisions_distribution(within: Within) -> None:
    """Of 16,000 each: means and deviations of area, log aspect and place, within four standard errors of the difference."""
    views, n = Views(crop_law="torchvision"), 16_000
    sizes = np.tile([[375, 500]], (n, 1))
    ours = draw.crop_boxes(views, 0, 0, np.arange(n, dtype=np.int64), sizes)[:, 0].astype(np.float64)
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)], np.float64)

    def measured(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        top, left, height, width = boxes.T
        places = top / np.maximum(375 - height, 1), left / np.maximum(500 - width, 1)
        return np.stack([height * width / (375 * 500), np.log(width / height), *places])

    a, b = measured(ours), measured(theirs)
    for power in (1, 2):
        error = np.sqrt((np.var(a**power, 1) + np.var(b**power, 1)) / n)
        within(f"moment {power}, standard errors", float((np.abs((a**power).mean(1) - (b**power).mean(1)) / error).max()), 4)
    assert abs(a[0].mean() - 0.44) < 0.01 and a[0].min() < 0.1  # no floor of a tenth


def test_where_no_crop_fits_it_is_torchvisions_middle() -> None:
    views = Views(crop_law="torchvision", area=(1.0, 1.0), aspect=(0.8, 1.25))
    for height, width in ((100, 500), (500, 100), (7, 90), (1, 3), (33, 2)):
        wanted = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [0.8, 1.25])
        found = draw.crop_boxes(views, 0, 0, np.arange(3, dtype=np.int64), np.tile([[height, width]], (3, 1)))
        assert found.shape == (3, 2, 4) and (found == wanted).all()


def test_each_operation_happens_with_its_probability() -> None:
    drawn = draw.draw_colours(Views(), 0, 0, np.arange(5000))  # two views each: 10,000 draws
    for happened, p in ((drawn.flip, 0.5), (drawn.jitter, 0.8), (drawn.grey, 0.2), (drawn.blur_sigma > 0, 0.5)):
        assert abs(happened.mean() - p) < 4 * np.sqrt(p * (1 - p) / len(happened))
    assert np.all(np.sort(drawn.order, 1) == np.arange(4))
    first = np.bincount(drawn.order[:, 0], minlength=4) / len(drawn.order)
    assert np.abs(first - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / len(drawn.order))
    assert drawn.factors[:, :3].min() >= 0.2 and drawn.factors[:, :3].max() <= 1.8
    assert np.abs(drawn.factors[:, 3]).max() <= 0.2
    assert drawn.blur_sigma[drawn.blur_sigma > 0].min() >= 0.1 and drawn.blur_sigma.max() <= 2.0


@pytest.mark.parametrize(
    ("settings", "p"),
    [
        ({"flip_p": 0.5}, 0.5),
        ({"jitter_p": 0.8, "colour_strength": 1.0}, 0.8),
        ({"grey_p": 0.2}, 0.2),
        # A blur of σ < 0.19 px moves no pixel by 1e-6: of σ in [0.1, 2.0] that is one in twenty.
        ({"blur_p": 0.5}, 0.5 * (2.0 - 0.19) / 1.9),
        ({"solarise_p": 0.2}, 0.2),
        ({}, 0.0),
    ],
    ids=["flip", "jitter", "grey", "blur", "solarise", "none"],
)
def test_each_operation_is_applied_with_its_probability(within: Within, settings: dict[str, float], p: float) -> None:
    """In the pixels: of 10,000 views with all else switched off, how many differ from the image."""
    off = {"flip_p": 0.0, "jitter_p": 0.0, "grey_p": 0.0, "blur_p": 0.0}
    config = Views(size_px=20, area=(1.0, 1.0), aspect=(1.0, 1.0), **(off | settings))  # type: ignore[arg-type]
    image = torch.tensor(np.random.default_rng(0).integers(0, 256, (20, 20, 3)), dtype=torch.uint8)
    changed = 0
    for begin in range(0, 5000, 500):
        ids = torch.arange(begin, begin + 500)
        out = two_views.raw_views(image.expand(500, -1, -1, -1), ids, 0, config, seed=1)
        changed += int((out - image.permute(2, 0, 1) / 255).abs().amax((1, 2, 3)).gt(1e-6).sum())
    if p == 0:
        assert changed == 0
    else:
        within("deviations from the probability", abs(changed / 10_000 - p) / np.sqrt(p * (1 - p) / 10_000), 4)


def test_probabilities_of_their_own_for_the_first_view_and_the_others() -> None:
    """BYOL's and MoCo v3's: blur 1.0 and 0.1, solarisation 0.0 and 0.2. Of more than two views all but the first have the second."""
    views, ids = Views(blur_p=(1.0, 0.1), solarise_p=(0.0, 0.2)), np.arange(5000)
    for first, count in ((0, 2), (3, 4), (5, 1)):
        drawn = draw.draw_colours(views, 0, 0, ids, first, count)
        blurred, solarised = (drawn.blur_sigma > 0).reshape(count, -1), drawn.solarise.reshape(count, -1)
        assert blurred[0].all() and not solarised[0].any()
        for view in range(1, count):
            for happened, p in ((blurred[view], 0.1), (solarised[view], 0.2)):
                assert abs(happened.mean() - p) < 4 * np.sqrt(p * (1 - p) / len(ids)), (first, view, p)
    # Neither decides on the other, nor on the dropped colour, whose numbers are neighbours.
    drawn = draw.draw_colours(Views(blur_p=0.5, solarise_p=0.5, grey_p=0.5), 0, 0, ids)
    for other in (drawn.blur_sigma > 0, drawn.grey, drawn.flip):
        assert abs(np.corrcoef(drawn.solarise, other)[0, 1]) < 4 / np.sqrt(2 * len(ids))


def test_what_was_drawn_before_there_was_solarisation_is_drawn_still() -> None:
    """To the bit, of any view: the digest is of the commit before."""
    ids = np.arange(5, 29)
    names = ("flip", "jitter", "order", "factors", "grey", "blur_sigma")
    drawn = [draw.draw_colours(views, 7, 3, ids) for views in (Views(), Views(blur_p=(0.5, 0.5), solarise_p=(0.3, 1.0)))]
    for one in drawn:
        found = hashlib.sha256(b"".join(np.ascontiguousarray(getattr(one, name)).tobytes() for name in names))
        assert found.hexdigest()[:16] == "b8c11b2f427d0183"
    assert not drawn[0].solarise.any() and drawn[1].solarise.any()


def test_solarisation_inverts_values_from_a_half_on() -> None:
    x = torch.tensor([0.0, 0.2, 0.4999, 0.5, 0.75, 1.0], dtype=torch.float64)
    assert ops.solarise(x).tolist() == [0.0, 0.2, 0.4999, 0.5, 0.25, 0.0]
    bytes_ = torch.arange(256) / 255  # a picture's: 128, the first beyond a half, becomes 127
    assert torch.equal(ops.solarise(bytes_), torch.where(bytes_ < 0.5, bytes_, 1 - bytes_))
    assert (ops.solarise(bytes_) * 255).round().int().tolist() == [*range(128), *range(127, -1, -1)]


def test_solarisation_comes_behind_the_blur(within: Within) -> None:
    off = {"flip_p": 0.0, "jitter_p": 0.0, "grey_p": 0.0, "area": (1.0, 1.0), "aspect": (1.0, 1.0)}
    config = Views(size_px=32, blur_p=1.0, solarise_p=(0.0, 1.0), **off)  # type: ignore[arg-type]
    images = torch.tensor(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)), dtype=torch.uint8)
    out = two_views.raw_views(images, torch.arange(5), 0, config, seed=1).double()
    x = images.permute(0, 3, 1, 2).double() / 255
    sigma = torch.tensor(draw.draw_colours(config, 1, 0, np.arange(5)).blur_sigma)
    first, second = ops.gaussian_blur(x, sigma[:5]), ops.gaussian_blur(x, sigma[5:])
    within("view 0", float((out[:5] - first).abs().max()), 1e-5)
    within("view 1", float((out[5:] - torch.where(second < 0.5, second, 1 - second)).abs().max()), 1e-5)


def test_saturation_may_change_less_than_brightness_and_contrast() -> None:
    """torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1), as BYOL and MoCo v3 have it: s = 0.5 and half of it for saturation."""
    ids = np.arange(20_000)
    factors = draw.draw_colours(Views(colour_strength=0.5, saturation=0.5), 0, 0, ids).factors
    np.testing.assert_allclose(factors.min(0), [0.6, 0.6, 0.8, -0.1], atol=1e-3)
    np.testing.assert_allclose(factors.max(0), [1.4, 1.4, 1.2, 0.1], atol=1e-3)
    full = draw.draw_colours(Views(colour_strength=0.5), 0, 0, ids).factors
    assert np.array_equal(factors[:, [0, 1, 3]], full[:, [0, 1, 3]])
    np.testing.assert_allclose(factors[:, 2] - 1, (full[:, 2] - 1) / 2, atol=1e-12)


def test_strength_scales_as_in_the_paper() -> None:
    """App. A: brightness, contrast and saturation by 0.8 s, hue by 0.2 s; s = 1 on ImageNet, 0.5 on CIFAR-10 (App. B.9)."""
    assert recipe("imagenet_resnet50").views.colour_strength == Views().colour_strength == 1.0
    assert recipe("cifar10_resnet18").views.colour_strength == 0.5
    for s in (0.25, 0.5, 1.0):
        factors = draw.draw_colours(Views(colour_strength=s), 0, 0, np.arange(20_000)).factors
        np.testing.assert_allclose(factors[:, :3].min(0), 1 - 0.8 * s, atol=2e-3)
        np.testing.assert_allclose(factors[:, :3].max(0), 1 + 0.8 * s, atol=2e-3)
        np.testing.assert_allclose([factors[:, 3].min(), factors[:, 3].max()], [-0.2 * s, 0.2 * s], atol=1e-3)
        assert np.abs(factors.mean(0) - [1, 1, 1, 0]).max() < 0.01


def test_a_view_depends_on_its_sample_alone() -> None:
    images = torch.tensor(np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3)), dtype=torch.uint8)
    ids = torch.arange(100, 112)
    config = Views(size_px=32)
    whole = two_views.two_views(images, ids, 5, config, seed=9)
    part = two_views.two_views(images[3:7], ids[3:7], 5, config, seed=9)
    assert torch.equal(part, torch.cat([whole[3:7], whole[15:19]]))
    assert not torch.equal(whole[:12], whole[12:])
    assert not torch.equal(whole, two_views.two_views(images, ids, 6, config, seed=9))


def test_crops_and_colours_are_each_keyed_by_seed_epoch_sample_and_view() -> None:
    """Of 50 images hardly one draws the same again when one of the four is another; which images are beside it does not count."""
    ids, sizes = np.arange(50), np.full((50, 2), 224)

    def crops(seed: int, epoch: int, ids: np.ndarray, view: int) -> np.ndarray:
        return draw.crops_of(Views(), seed, epoch, ids, sizes, view)

    def colours(seed: int, epoch: int, ids: np.ndarray, view: int) -> np.ndarray:
        return draw.draw_colours(Views(), seed, epoch, ids, view, 1).factors

    for drawn in (crops, colours):
        first = drawn(3, 5, ids, 0)
        assert np.array_equal(first, drawn(3, 5, ids, 0)) and np.array_equal(first[::-1], drawn(3, 5, ids[::-1], 0))
        for other in (drawn(4, 5, ids, 0), drawn(3, 6, ids, 0), drawn(3, 5, ids + 50, 0), drawn(3, 5, ids, 1)):
            assert (first == other).all(1).sum() <= 1
    both = draw.crop_boxes(Views(), 3, 5, ids, sizes)
    assert np.array_equal(both[:, 0], crops(3, 5, ids, 0)) and np.array_equal(both[:, 1], crops(3, 5, ids, 1))


@pytest.mark.parametrize("by_index", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_flip_is_from_left_to_right(within: Within, monkeypatch: pytest.MonkeyPatch, whole: bool, by_index: bool) -> None:
    """Whole images and crops, on devices of both kinds."""
    monkeypatch.setattr(two_views, "by_index", lambda device: by_index)
    off = {"jitter_p": 0.0, "grey_p": 0.0, "blur_p": 0.0, "area": (1.0, 1.0), "aspect": (1.0, 1.0)}
    images = torch.tensor(np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3)), dtype=torch.uint8)
    given = images if whole else images[:, None].repeat(1, 2, 1, 1, 1)
    out = two_views.raw_views(given, torch.arange(5), 0, Views(size_px=20, flip_p=1.0, **off), seed=1)  # type: ignore[arg-type]
    within("pixels", float((out - images.permute(0, 3, 1, 2).flip(3).repeat(2, 1, 1, 1) / 255).abs().max()), 1e-6)


def test_crops_of_both_views_and_whole_images_go_the_same_way() -> None:
    config = Views(size_px=16, area=(1.0, 1.0), aspect=(1.0, 1.0))
    images = torch.tensor(np.random.default_rng(1).integers(0, 256, (6, 16, 16, 3)), dtype=torch.uint8)
    crops = images[:, None].repeat(1, 2, 1, 1, 1)  # whole-image crops, as the JPEG decoder would give them
    ids = torch.arange(6)
    torch.testing.assert_close(
        two_views.two_views(images, ids, 0, config, 0), two_views.two_views(crops, ids, 0, config, 0), rtol=0, atol=1e-6
    )


def test_philox_known_answers() -> None:
    """The test vectors of Random123 (philox4x32-10)."""
    zero, ones = np.zeros(1, np.uint64), np.full(1, 0xFFFFFFFF, np.uint64)
    assert [int(w[0]) for w in keyed.philox((zero,) * 4, (0, 0))] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    high = (0xFFFFFFFF, 0xFFFFFFFF)
    assert [int(w[0]) for w in keyed.philox((ones,) * 4, high)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_permutation_is_one_and_changes_with_its_key() -> None:
    order = keyed.permutation(0, 0, 1000)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(order, keyed.permutation(0, 1, 1000))
    assert not np.array_equal(order, keyed.permutation(1, 0, 1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.13  # 4 / sqrt(1000)
