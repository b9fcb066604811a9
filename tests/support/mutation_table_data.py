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
    Mutation(
        "an-inner-tar-goes-on-in-the-next",
        "simclr/data/sources/tar.py",
        "if end is not None and after > end:",
        "if end is None and after < 0:",
        "tests/simclr/data/test_archives.py::test_an_inner_archive_that_is_cut_does_not_go_on_in_the_next",
    ),
    Mutation(
        "the-rest-of-a-tar-is-left-out",
        "simclr/data/sources/tar.py",
        "len(rest) > _RECORD_BYTES and",
        "len(rest) < 0 and",
        "tests/simclr/data/test_archives.py::test_an_archive_that_goes_on_behind_its_end_is_refused",
    ),
    Mutation(
        "captions-are-classes",
        "simclr/data/sources/webdataset.py",
        "<= len(distinct) <= len(texts) / 2",
        "<= len(distinct) <= len(texts)",
        "tests/simclr/data/test_webdataset.py::test_a_txt_that_pictures_share_is_a_class_and_else_a_caption",
    ),
    Mutation(
        "boxes-are-classes",
        "simclr/data/sources/webdataset.py",
        "and short and not numbers:",
        "and short:",
        "tests/simclr/data/test_webdataset.py::test_a_txt_is_no_class_if_it_tells_nothing_apart_or_holds_a_box",
    ),
    Mutation(
        "folders-in-an-inner-tar-are-not-seen",
        "simclr/data/sources/tar.py",
        "len(inner) <= _FEW_INNER or c in numbered or not _begins_loose(*within(name))",
        "c in numbered",
        "tests/simclr/data/test_inner_archives.py::test_folders_in_a_tar_in_a_tar_are_those_of_splits_and_classes",
    ),
    Mutation(
        "the-coarse-labels-are-the-classes",
        "simclr/data/sources/parquet.py",
        "best = max(pool",
        "best = min(pool",
        "tests/simclr/data/test_tables.py::test_of_several_labels_the_finer_ones_are_the_classes",
    ),
    Mutation(
        "the-table-is-taken-for-sorted",
        "simclr/data/loader.py",
        'table = table[np.argsort(table["sample_id"], kind="stable")]',
        "table = table[:]",
        "tests/simclr/data/test_beton.py::test_pixels_are_registered_in_place_and_read",
    ),
    Mutation(
        "stl10-without-its-unlabelled-images",
        "simclr/data/sources/torchvision.py",
        '("train+unlabeled", "test")',
        '("train", "test")',
        "tests/simclr/data/test_torchvision.py::test_stl10_trains_on_its_unlabelled_images_too",
    ),
    Mutation(
        "a-dry-run-writes",
        "pipelines/commands/prepare.py",
        "        print(dry_run(args))\n        return\n",
        "        print(dry_run(args))\n",
        "tests/pipelines/commands/test_prepare.py::test_a_dry_run_says_all_that_was_understood_and_writes_nothing",
    ),
    Mutation(
        "classes-that-training-lacks-score-0",
        "pipelines/evaluation/inputs.py",
        "if len(strange) == len(test):",
        "if len(strange) > len(test):",
        "tests/pipelines/evaluation/test_classes.py::test_a_test_split_without_any_class_of_training_is_refused",
    ),
    Mutation(
        "unreadable-images-count-as-written",
        "simclr/data/forecast.py",
        "total * (1 - len(self.skipped) / max(self.timed, 1)) * self.bytes_each",
        "total * self.bytes_each",
        "tests/simclr/data/test_forecast.py::test_a_sample_is_encoded_as_shards_would_hold_it",
    ),
)
