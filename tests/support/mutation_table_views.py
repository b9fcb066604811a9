"""Ways to break views: see `tests.support.mutation_table`."""

from __future__ import annotations

from tests.support.mutation import Mutation

VIEWS = (
    Mutation(
        "crop-width-for-height",
        "simclr/views/draw.py",
        "left = (u[:, 3] * np.maximum(w - width, 1)).astype(np.int64)\n    return fits, np.stack([top, left, height, width], 1)",
        "left = (u[:, 3] * np.maximum(w - width, 1)).astype(np.int64)\n    return fits, np.stack([top, left, width, height], 1)",
        "tests/simclr/views/test_two_views.py::test_crop_boxes_have_the_official_distribution",
    ),
    Mutation(
        "hue-in-sectors",
        "simclr/views/ops.py",
        "torch.remainder(sector + 6 * turn + offsets, 6.0)",
        "torch.remainder(sector + turn + offsets, 6.0)",
        "tests/simclr/views/test_two_views.py::test_colour_and_blur_equal_the_official_pixels",
    ),
    Mutation(
        "blur-for-every-image",
        "simclr/views/draw.py",
        "np.where(u[:, 11] < blur_p, 0.1 + 1.9 * u[:, 12], 0.0)",
        "0.1 + 1.9 * u[:, 12]",
        "tests/simclr/views/test_two_views.py::test_each_operation_happens_with_its_probability",
    ),
    Mutation(
        "photographs-flipped-upside-down",
        "simclr/views/two_views.py",
        "x.index_copy_(0, rows, x[rows].flip(3))",
        "x.index_copy_(0, rows, x[rows].flip(2))",
        "tests/simclr/views/test_two_views.py::test_a_flip_is_from_left_to_right",
    ),
    Mutation(
        "whole-images-flipped-upside-down",
        "simclr/views/ops.py",
        "columns = torch.where(flip[:, None, None], columns.flip(1), columns)",
        "rows = torch.where(flip[:, None, None], rows.flip(1), rows)",
        "tests/simclr/views/test_two_views.py::test_a_flip_is_from_left_to_right",
    ),
    Mutation(
        "crops-ignore-the-view",
        "simclr/views/draw.py",
        'keyed.uniform(seed, "crop", epoch, ids[waiting], view,',
        'keyed.uniform(seed, "crop", epoch, ids[waiting], 0,',
        "tests/simclr/views/test_two_views.py::test_crops_and_colours_are_each_keyed_by_seed_epoch_sample_and_view",
    ),
    Mutation(
        "crops-ignore-the-epoch",
        "simclr/views/draw.py",
        'keyed.uniform(seed, "crop", epoch, ids[waiting], view,',
        'keyed.uniform(seed, "crop", 0, ids[waiting], view,',
        "tests/simclr/views/test_two_views.py::test_crops_and_colours_are_each_keyed_by_seed_epoch_sample_and_view",
    ),
    Mutation(
        "colours-ignore-the-epoch",
        "simclr/views/draw.py",
        'keyed.uniform(seed, "colour", epoch, ids, view, 16)',
        'keyed.uniform(seed, "colour", 0, ids, view, 16)',
        "tests/simclr/views/test_two_views.py::test_crops_and_colours_are_each_keyed_by_seed_epoch_sample_and_view",
    ),
    Mutation(
        "colours-ignore-the-seed",
        "simclr/views/draw.py",
        'keyed.uniform(seed, "colour", epoch, ids, view, 16)',
        'keyed.uniform(0, "colour", epoch, ids, view, 16)',
        "tests/simclr/views/test_two_views.py::test_crops_and_colours_are_each_keyed_by_seed_epoch_sample_and_view",
    ),
    Mutation(
        "solarised-where-blurred",
        "simclr/views/draw.py",
        "solarise=u[:, 13] < solarise_p,",
        "solarise=u[:, 11] < solarise_p,",
        "tests/simclr/views/test_two_views.py::test_probabilities_of_their_own_for_the_first_view_and_the_others",
    ),
    Mutation(
        "probabilities-by-the-number-among-all-crops",
        "simclr/views/draw.py",
        "np.repeat([views.of_view(name, view) for view in range(count)], len(ids))",
        "np.repeat([views.of_view(name, view) for view in range(first, first + count)], len(ids))",
        "tests/simclr/views/test_two_views.py::test_probabilities_of_their_own_for_the_first_view_and_the_others",
    ),
    Mutation(
        "dark-values-inverted-too",
        "simclr/kernels/views_cpu.py",
        "plane[i] = min(plane[i], _f32(1) - plane[i])",
        "plane[i] = _f32(1) - plane[i]",
        "tests/simclr/kernels/test_views_cpu.py::test_views_on_the_cpu_are_the_plain_ones",
    ),
    Mutation(
        "a-probe-on-solarised-crops",
        "simclr/evaluation/linear.py",
        "blur_p=0.0, solarise_p=0.0)",
        "blur_p=0.0)",
        "tests/simclr/evaluation/test_linear.py::test_sgd_is_nesterov_under_half_a_cosine_and_the_encoder_is_untouched",
    ),
)
