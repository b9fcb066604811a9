"""Mutations of SimCLR's siblings and of what they brought: what has cost their users weeks."""

from __future__ import annotations

from tests.support.mutation import Mutation

_MOCO, _MOCOV3, _BYOL = (f"tests/simclr/methods/test_{name}.py" for name in ("moco", "mocov3", "byol"))
_GOLDEN = "tests/simclr/methods/test_moco_golden.py"
_OPTIM = "tests/simclr/test_optim_family.py"
_VIT = "tests/simclr/networks/test_vit.py"

FAMILY = (
    # ── Averages and queues ────────────────────────────────────────────────────────────────────────────────────────
    Mutation(
        "average-takes-the-share-that-it-keeps",
        "simclr/methods/average.py",
        "list(module.parameters()), 1 - keep)",
        "list(module.parameters()), keep)",
        f"{_GOLDEN}::test_the_average_moves_as_the_authors",
    ),
    Mutation(
        "average-of-running-statistics-too",
        "simclr/methods/average.py",
        "list(module.parameters()), 1 - keep)",
        "list(module.parameters()), 1 - keep)\n"
        "    for mine, theirs in zip(average.buffers(), module.buffers(), strict=True):\n        mine.lerp_(theirs, 1 - keep)",
        f"{_GOLDEN}::test_three_steps_on_two_ranks_are_the_authors",
    ),
    Mutation(
        "momentum-that-ends-below-1",
        "simclr/methods/average.py",
        "math.cos(math.pi * min(step, total) / max(total, 1))",
        "math.cos(0.5 * math.pi * min(step, total) / max(total, 1))",
        f"{_MOCOV3}::test_schedules_are_the_authors_by_step {_BYOL}::test_schedules_are_the_authors",
    ),
    Mutation(
        "momentum-of-the-first-step-for-ever",
        "simclr/methods/mocov3.py",
        "keep = cosine_to_one(step, total, config.ema)",
        "keep = cosine_to_one(0, total, config.ema)",
        f"{_MOCOV3}::test_the_average_moves_by_step_ahead_of_its_pass_and_stays_float32_in_bfloat16",
    ),
    Mutation(
        "target-follows-a-step-late",
        "simclr/methods/byol.py",
        "keep = cosine_to_one(step, total, base)",
        "keep = cosine_to_one(step - 1, total, base)",
        f"{_BYOL}::test_the_target_follows_behind_the_optimizer_by_step",
    ),
    Mutation(
        "target-that-begins-as-a-copy",
        "simclr/methods/byol.py",
        "_trunk(config, target_seed(config.seed))",
        "_trunk(config, config.seed)",
        f"{_BYOL}::test_the_target_begins_with_weights_of_its_own_keyed_by_the_seed",
    ),
    Mutation(
        "queue-written-one-place-on",
        "simclr/methods/queue.py",
        "at = step * len(rows)",
        "at = (step + 1) * len(rows)",
        f"{_GOLDEN}::test_loss_gradient_and_queue_of_three_steps",
    ),
    Mutation(
        "queue-of-any-size",
        "simclr/family.py",
        "self.queue > 0 and self.queue % keys == 0",
        "self.queue > 0",
        f"{_MOCO}::test_what_does_not_fit_is_refused_in_a_sentence",
    ),
    Mutation(
        "key-network-that-never-follows",
        "simclr/methods/moco.py",
        "        before=before,\n",
        "",
        f"{_MOCO}::test_the_average_moves_ahead_of_its_pass_and_equals_the_network_at_first",
    ),
    # ── Losses ─────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutation(
        "symmetric-loss-averaged",
        "simclr/methods/moco.py",
        "for q, k in pairs]).sum()",
        "for q, k in pairs]).mean()",
        f"{_GOLDEN}::test_the_symmetric_loss_is_a_sum_over_one_queue",
    ),
    Mutation(
        "query-against-the-key-of-its-own-view",
        "simclr/methods/moco.py",
        'targets["keys"].flip(0)',
        'targets["keys"]',
        f"{_GOLDEN}::test_the_symmetric_loss_is_a_sum_over_one_queue",
    ),
    Mutation(
        "loss-without-2-tau",
        "simclr/loss.py",
        "2 * temperature * F.cross_entropy",
        "F.cross_entropy",
        f"{_MOCOV3}::test_the_loss_of_each_rank_and_its_gradients_are_the_authors",
    ),
    Mutation(
        "prediction-against-the-key-of-its-own-view",
        "simclr/methods/mocov3.py",
        "info_nce(q1, k2, tau, images) + info_nce(q2, k1, tau, images)",
        "info_nce(q1, k1, tau, images) + info_nce(q2, k2, tau, images)",
        f"{_MOCOV3}::test_three_steps_are_the_authors",
    ),
    Mutation(
        "gradient-into-the-target",
        "simclr/loss.py",
        "projections.detach().flip(0)",
        "projections.flip(0)",
        f"{_BYOL}::test_loss_and_gradient_are_the_authors",
    ),
    Mutation(
        "prediction-of-its-own-view",
        "simclr/loss.py",
        "projections.detach().flip(0)",
        "projections.detach()",
        f"{_BYOL}::test_loss_and_gradient_are_the_authors",
    ),
    Mutation(
        "one-direction-counted-twice",
        "simclr/loss.py",
        "(p - t).square().sum(2).sum(0).mean()",
        "(2 * (p - t)[0].square().sum(1)).mean()",
        f"{_BYOL}::test_loss_and_gradient_are_the_authors",
    ),
    # ── Optimizers ─────────────────────────────────────────────────────────────────────────────────────────────────
    Mutation(
        "vectors-adapt-under-lars",
        "simclr/optim.py",
        "return p.ndim > 1, p.ndim > 1",
        "return True, True",
        f"{_OPTIM}::test_lars_follows_the_authors {_MOCOV3}::test_three_steps_are_the_authors",
    ),
    Mutation(
        "positions-decay-by-our-rule",
        "simclr/optim.py",
        ' or owner in ("pos_embed", "position_embedding", "position_embeddings")',
        "",
        "tests/simclr/test_parameter_groups.py",
    ),
    Mutation(
        "rate-on-the-wrong-side-of-the-buffer",
        "simclr/optim.py",
        '(group["lr"], 1.0) if group["rate_in_buffer"]',
        '(group["lr"], 1.0) if not group["rate_in_buffer"]',
        f"{_OPTIM}::test_lars_follows_the_authors",
    ),
    Mutation(
        "one-clip-for-all-gradients",
        "simclr/optim.py",
        "norms = torch.stack(torch._foreach_norm(grads))\n",
        "norms = torch.stack(torch._foreach_norm(grads)).norm().expand(len(grads))\n",
        f"{_OPTIM}::test_each_gradient_is_clipped_as_dinos_authors_have_it",
    ),
    # ── Networks and views ─────────────────────────────────────────────────────────────────────────────────────────
    Mutation(
        "positions-column-first",
        "simclr/networks/vit.py",
        "[np.sin(row), np.cos(row), np.sin(column), np.cos(column)]",
        "[np.sin(column), np.cos(column), np.sin(row), np.cos(row)]",
        f"{_VIT}::test_sines_and_cosines_are_mocov3s",
    ),
    Mutation(
        "attention-behind-the-last-block",
        "simclr/networks/vit.py",
        "block.norm1(network.stages(x)[-2])",
        "block.norm1(network.stages(x)[-1])",
        f"{_VIT}::test_the_class_tokens_attention_is_dinos",
    ),
    Mutation(
        "painted-patches-left-normalised",
        "simclr/methods/mae.py",
        "pred = pred * deviation + mean",
        "pred = pred + mean",
        "tests/simclr/methods/test_mae.py::test_a_completed_picture_has_its_seen_patches_and_painted_ones_in_their_scale",
    ),
    Mutation(
        "paths-that-keep-their-length",
        "simclr/networks/vit.py",
        "(np.floor(keep + uniform) / keep)",
        "np.floor(keep + uniform)",
        f"{_VIT}::test_a_path_is_left_out_or_enlarged",
    ),
    Mutation(
        "both-views-blurred-alike",
        "simclr/views/draw.py",
        "np.repeat([views.of_view(name, view) for view in range(count)], len(ids))",
        "np.repeat([views.of_view(name, 0) for view in range(count)], len(ids))",
        "tests/simclr/views/test_two_views.py::test_probabilities_of_their_own_for_the_first_view_and_the_others",
    ),
)
