"""Ways to break ranks that hold different numbers of images: see `tests.support.mutation_table`."""

from __future__ import annotations

from tests.support.mutation import Mutation

RANKS = (
    Mutation(
        "uneven-ranks-count-alike",
        "simclr/collectives.py",
        "else mean * (own * world_size() / images)",
        "else mean",
        "tests/simclr/test_uneven_ranks.py::test_loss_and_gradient_of_eight_images_are_those_of_one_process",
    ),
    Mutation(
        "uneven-ranks-positions-of-even-ones",
        "simclr/collectives.py",
        "    return _rows_per_image(x, images) * before\n",
        "    return rank() * len(x)\n",
        "tests/simclr/test_uneven_ranks.py::test_loss_and_gradient_of_eight_images_are_those_of_one_process",
    ),
    Mutation(
        "pieces-of-uneven-ranks-differ-in-number",
        "simclr/config.py",
        "min(-(-most // self.train.micro_batch), fewest)",
        "-(-most // self.train.micro_batch)",
        "tests/simclr/test_gradient_cache.py::test_every_worker_has_as_many_pieces_none_of_them_empty_or_larger_than_asked",
    ),
    Mutation(
        "a-rank-reads-one-group-where-its-images-lie-in-two",
        "simclr/shares.py",
        "return range(rank * groups // world, -(-(rank + 1) * groups // world))",
        "return range(rank * groups // world, rank * groups // world + 1)",
        "tests/simclr/test_uneven_ranks.py::test_a_step_has_the_same_images_on_three_ranks_of_two_groups",
    ),
)
