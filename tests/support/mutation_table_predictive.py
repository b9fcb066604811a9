"""Mutations of SwAV, DINO, MAE and CLIP: what makes a run of theirs look healthy and learn something else."""

from __future__ import annotations

from tests.support.mutation import Mutation

_SWAV, _DINO, _MAE, _CLIP = (f"tests/simclr/methods/test_{name}.py" for name in ("swav", "dino", "mae", "clip"))
_LOSS = "simclr/loss.py"

PREDICTIVE = (
    # ── SwAV ───────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutation(
        "codes-balanced-on-each-rank-alone",
        _LOSS,
        "q = q / (all_reduce_sum(q.sum(0)) * q.shape[1])",
        "q = q / (q.sum(0) * q.shape[1])",
        f"{_SWAV}::test_assignments_are_the_authors",
    ),
    Mutation(
        "codes-of-the-queues-rows",
        "simclr/methods/swav.py",
        "codes[:, -scores.shape[1] :]",
        "codes[:, : scores.shape[1]]",
        f"{_SWAV}::test_seven_steps_are_the_authors",
    ),
    Mutation(
        "a-crop-predicts-its-own-code",
        _LOSS,
        "others = log_p.sum(0) - log_p[:2]",
        "others = log_p.sum(0) - log_p[:2].flip(0)",
        f"{_SWAV}::test_loss_and_gradients_are_the_authors",
    ),
    Mutation(
        "prototypes-of-any-length",
        "simclr/methods/swav.py",
        "prototypes.weight.copy_(F.normalize(prototypes.weight, dim=1))",
        "prototypes.weight.copy_(prototypes.weight)",
        f"{_SWAV}::test_seven_steps_are_the_authors {_SWAV}::test_prototypes_wait_and_then_learn",
    ),
    Mutation(
        "prototypes-that-never-wait",
        "simclr/methods/swav.py",
        "    if step < steps:\n",
        "    if step < 0:\n",
        f"{_SWAV}::test_seven_steps_are_the_authors {_SWAV}::test_prototypes_wait_and_then_learn",
    ),
    Mutation(
        "a-queue-used-before-it-is-full",
        "simclr/methods/swav.py",
        "return size if (step - self.first) * self.images >= size else 0",
        "return size if step > self.first else 0",
        f"{_SWAV}::test_seven_steps_are_the_authors",
    ),
    # ── DINO ───────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutation(
        "centre-of-one-rank",
        "simclr/methods/dino.py",
        "mean = all_reduce_sum(scores.to(self.centre.dtype).sum((0, 1))) / (len(scores) * images)",
        "mean = scores.to(self.centre.dtype).mean((0, 1))",
        f"{_DINO}::test_loss_gradient_and_centre_of_three_calls_are_the_authors",
    ),
    Mutation(
        "centre-that-moves-ahead-of-the-loss",
        "simclr/methods/dino.py",
        "    images = config.train.batch_size\n    found = losses.dino(",
        "    images = config.train.batch_size\n    teacher.recentre(targets['t'], images, config.centre_ema)\n    found = losses.dino(",
        f"{_DINO}::test_four_steps_are_the_authors",
    ),
    Mutation(
        "average-as-soft-as-the-network",
        "simclr/methods/dino.py",
        "config.temperature, sharp, images)",
        "config.temperature, config.temperature, images)",
        f"{_DINO}::test_four_steps_are_the_authors",
    ),
    Mutation(
        "teacher-warm-up-a-step-long",
        "simclr/methods/dino.py",
        "teacher_temperature(config, step // per_epoch)",
        "teacher_temperature(config, step)",
        f"{_DINO}::test_the_temperature_of_the_average_is_set_epoch_by_epoch",
    ),
    Mutation(
        "average-that-misses-the-head",
        "simclr/methods/dino.py",
        "        move(self.head, network.head, keep)\n",
        "",
        f"{_DINO}::test_the_last_layer_waits_and_centre_and_average_follow",
    ),
    Mutation(
        "last-layer-that-never-waits",
        "simclr/methods/dino.py",
        "    if step < steps:\n        for p",
        "    if step < 0:\n        for p",
        f"{_DINO}::test_the_last_layer_waits_and_centre_and_average_follow",
    ),
    # ── MAE ────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutation(
        "masks-of-the-first-epoch-for-ever",
        "simclr/methods/mae.py",
        "orders(config, batch.epoch, batch.ids[some].numpy())",
        "orders(config, 0, batch.ids[some].numpy())",
        f"{_MAE}::test_masks_are_keyed_by_seed_epoch_and_image",
    ),
    Mutation(
        "masks-by-the-place-in-the-batch",
        "simclr/methods/mae.py",
        'keyed.uniform(config.seed, "mask", epoch, ids, 0, config.patches)',
        'keyed.uniform(config.seed, "mask", epoch, np.arange(len(ids)), 0, config.patches)',
        f"{_MAE}::test_masks_are_keyed_by_seed_epoch_and_image",
    ),
    Mutation(
        "loss-of-seen-patches-too",
        _LOSS,
        "(of_patches * gone).sum() / gone.sum()",
        "of_patches.mean()",
        f"{_MAE}::test_the_loss_and_its_gradient_are_the_authors",
    ),
    Mutation(
        "loss-of-the-patches-that-are-seen",
        "simclr/methods/mae.py",
        "scatter_(1, order[:, : config.kept], 0.0)",
        "scatter_(1, order[:, config.kept :], 0.0)",
        f"{_MAE}::test_loss_prediction_and_gradients_are_the_authors",
    ),
    Mutation(
        "encoder-that-sees-the-hidden-patches",
        "simclr/methods/mae.py",
        'self.encoder.visible(rows["views"][0], order[:, : self.kept])',
        'self.encoder.visible(rows["views"][0], order[:, -self.kept :])',
        f"{_MAE}::test_loss_prediction_and_gradients_are_the_authors",
    ),
    # ── CLIP ───────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutation(
        "texts-of-other-ranks-without-gradient",
        _LOSS,
        "(a @ all_gather(b, images).T)",
        "(a @ torch.cat([all_gather(b, images).detach()[: own[0]], b, all_gather(b, images).detach()[own[0] + len(b) :]]).T)",
        f"{_CLIP}::test_the_loss_and_its_gradients_are_the_authors",
    ),
    Mutation(
        "one-direction-of-captions",
        _LOSS,
        "share_of_mean((rows + columns) / 2, len(a), images)",
        "share_of_mean(rows, len(a), images)",
        f"{_CLIP}::test_the_loss_and_its_gradients_are_the_authors",
    ),
    Mutation(
        "captions-of-the-first-rows",
        "simclr/methods/clip.py",
        "words.tokens_of(batch.captions[some], config.context)",
        "words.tokens_of(batch.captions[: some.stop - some.start], config.context)",
        f"{_CLIP}::test_an_image_meets_its_own_caption",
    ),
    Mutation(
        "an-end-within-a-caption-ends-it",
        "simclr/data/tokens.py",
        "    tokenizer.cache.clear()\n    return tokenizer",
        "    return tokenizer",
        f"{_CLIP}::test_an_end_within_a_caption_is_a_word",
    ),
    Mutation(
        "names-that-the-context-cuts-tell-classes-apart",
        "simclr/data/tokens.py",
        "found[at, : context - 1]",
        "found[at, :context]",
        f"{_CLIP}::test_prompts_that_a_short_context_cuts_ahead_of_the_name_are_refused",
    ),
    Mutation(
        "a-scale-without-bounds",
        "simclr/methods/clip.py",
        "network.log_scale.clamp_(0.0, math.log(most))",
        "network.log_scale.clamp_(0.0, 100.0)",
        f"{_CLIP}::test_the_scale_is_learnt_and_stays_within_its_bounds",
    ),
    Mutation(
        "captions-in-the-order-of-the-shards",
        "simclr/data/samples.py",
        'samples.captions["ptr"].tolist()',
        'np.sort(samples.captions["ptr"]).tolist()',
        f"{_CLIP}::test_an_image_meets_its_own_caption {_CLIP}::test_every_rank_has_the_captions_of_its_images",
    ),
)
