"""Ways to break BatchNorm over ranks, and the model of `simclr bench scale`; the rest stands in `mutation_table`."""

from __future__ import annotations

from tests.support.mutation import Mutation

_SHARED = "tests/simclr/networks/test_batchnorm.py::test_ranks_that_share_statistics_are_one_process_with_their_images"

NORMS = (
    Mutation(
        "uneven-ranks-weigh-alike",
        "simclr/networks/batchnorm.py",
        "torch.cat([both * own, own])",
        "torch.cat([both, torch.ones_like(own)])",
        _SHARED,
    ),
    Mutation(
        "group-gradient-over-all-ranks",
        "simclr/networks/batchnorm.py",
        "count = ctx.over.ranks * x.numel()",
        "count = world_size() * x.numel()",
        _SHARED,
    ),
    Mutation(
        "sums-wait-behind-gradients",
        "simclr/networks/batchnorm.py",
        "own_group(size)) for size",
        "own_group(size) if size < world else None) for size",
        "tests/simclr/networks/test_batchnorm.py::test_sums_have_process_groups_of_their_own_with_the_timeout_of_all",
    ),
    Mutation(
        "every-rank-evaluates-a-network-of-its-own",
        "simclr/train.py",
        "                take_first_ranks(method.network)\n",
        "",
        "tests/simclr/test_norm_groups.py::test_ranks_evaluate_the_network_that_the_checkpoint_has",
    ),
    Mutation(
        "one-latency-for-all-buckets",
        "pipelines/bench/scale_model.py",
        "gradients, gather, norm = work.buckets * bucket,",
        "gradients, gather, norm = all_reduce(work.gradient_bytes, on),",
        "tests/pipelines/bench/test_speed.py::test_the_model_by_hand",
    ),
)
