"""Ways to break pairs from time."""

from __future__ import annotations

from tests.support.mutation import Mutation

_VIDEOS, _FOLDERS = "tests/simclr/data/test_videos.py", "tests/simclr/data/test_video_folders.py"
_LAW = f"{_VIDEOS}::test_a_neighbour_is_another_frame_of_the_same_video_within_reach_and_uniform_among_these"

TIME = (
    Mutation("a-frame-is-its-own-neighbour", "simclr/data/videos.py", "there += (there >= own) & (high > low)", "there += 0 * own", _LAW),
    Mutation(
        "a-neighbour-of-the-next-video",
        "simclr/data/videos.py",
        "np.append(videos.firsts, videos.examples)[video + 1] - 1",
        "np.append(videos.firsts, videos.examples)[video + 1]",
        _LAW,
    ),
    Mutation(
        "neighbours-forget-the-epoch",
        "simclr/data/videos.py",
        'keyed.uniform(seed, "neighbour", epoch, ids, 0, 1)',
        'keyed.uniform(seed, "neighbour", 0, ids, 0, 1)',
        f"{_VIDEOS}::test_a_neighbour_is_a_function_of_seed_epoch_and_id_alone",
    ),
    Mutation(
        "frames-of-a-video-are-dealt-to-one-batch",
        "simclr/data/videos.py",
        "pack.reshape(batch_size, batches).T",
        "pack.reshape(batches, batch_size)",
        f"{_VIDEOS}::test_a_batch_has_as_few_frames_of_a_video_as_an_epoch_allows",
    ),
    Mutation(
        "both-crops-are-of-the-first-frame",
        "simclr/data/loader.py",
        "mine.then(mates)",
        "mine.then(mine)",
        f"{_VIDEOS}::test_both_crops_of_photographs_are_of_two_frames",
    ),
    Mutation(
        "the-second-crop-has-the-box-of-the-first-frames-size",
        "simclr/data/loader.py",
        "mine.ids, mates.sizes)[:, 1]",
        "mine.ids, mine.sizes)[:, 1]",
        f"{_VIDEOS}::test_both_crops_of_photographs_are_of_two_frames",
    ),
    Mutation(
        "both-raw-views-are-of-the-first-frame",
        "simclr/methods/method.py",
        "mates, n = batch.images[1][some]",
        "mates, n = batch.images[0][some]",
        f"{_VIDEOS}::test_both_views_of_raw_frames_are_of_two_frames",
    ),
    Mutation(
        "frames-are-held-out-one-by-one",
        "simclr/data/sources/plan.py",
        "return video_of(name) if self.videos else name",
        "return name",
        f"{_FOLDERS}::test_a_fraction_is_of_videos",
    ),
    Mutation(
        "frame-10-comes-before-frame-2",
        "simclr/data/sources/videos.py",
        "(key_of(_stem(name)), name) for",
        "((_stem(name),), name) for",
        f"{_FOLDERS}::test_frames_of_a_video_follow_each_other_in_natural_order",
    ),
    Mutation(
        "decimals-in-names-count-on-behind-the-dot",
        "simclr/data/sources/videos.py",
        "key_of = decimal if",
        "key_of = natural if",
        f"{_FOLDERS}::test_decimal_numbers_in_names_count_by_their_value",
    ),
    Mutation(
        "a-table-of-videos-is-not-checked",
        "simclr/data/manifest.py",
        "if firsts[:1] != (0,) or any(",
        "if not firsts and any(",
        f"{_FOLDERS}::test_a_table_of_videos_that_cannot_be_is_refused_and_none_is_as_before",
    ),
)
