"""Ways to break what makes shards of pictures; the rest stands in `mutation_table`."""

from __future__ import annotations

from tests.support.mutation import Mutation

DATA = (
    Mutation(
        "each-image-has-its-own-range",
        "simclr/data/depth.py",
        "black, white = rule.ranges[kind]\n    if values",
        "black, white = 0.0, float(values.max())\n    if values",
        "tests/simclr/data/test_pixels.py::test_twelve_bits_in_sixteen_keep_their_greys_and_their_brightness",
    ),
    Mutation(
        "skipped-images-are-counted-at-the-end",
        "simclr/data/shards.py",
        "            self._require_readable(skipped, seen - 1)\n",
        "",
        "tests/simclr/data/test_goes_on.py::test_too_many_damaged_files_stop_it_at_once_and_more_are_allowed_later",
    ),
    Mutation(
        "changed-files-are-the-same",
        "simclr/data/agreement.py",
        "manifest.times != source.times",
        "not manifest.times",
        "tests/simclr/data/test_agreement.py::test_files_that_changed_with_names_and_sizes_alike_are_told_apart",
    ),
)
