"""Ways to break the code: what `tests.support.mutations` applies, one at a time, and the tests that must notice."""

from __future__ import annotations

from tests.support.mutation import Mutation
from tests.support.mutation_table_attack import ATTACK
from tests.support.mutation_table_cluster import CLUSTER
from tests.support.mutation_table_data import DATA
from tests.support.mutation_table_family import FAMILY
from tests.support.mutation_table_norms import NORMS
from tests.support.mutation_table_predictive import PREDICTIVE
from tests.support.mutation_table_ranks import RANKS
from tests.support.mutation_table_resume import RESUME
from tests.support.mutation_table_time import TIME
from tests.support.mutation_table_tracking import TRACKING
from tests.support.mutation_table_uses import USES
from tests.support.mutation_table_views import VIEWS

MUTATIONS = (
    *DATA,
    *ATTACK,
    *TIME,
    *TRACKING,
    *FAMILY,
    *PREDICTIVE,
    *NORMS,
    *RANKS,
    *RESUME,
    *USES,
    *VIEWS,
    *CLUSTER,
    # ── simclr: loss, optimizer, statistics ────────────────────────────────────────────────────────────────────────
    Mutation(
        "positive-not-in-denominator",
        "simclr/loss.py",
        'float("-inf"))  # a view is no candidate for itself\n        return _share(F.cross_entropy(logits, _partner(own)), z, images)',
        'float("-inf"))\n        positive = logits.gather(1, _partner(own)[:, None])\n'
        '        return (logits.scatter(1, _partner(own)[:, None], float("-inf")).logsumexp(1) - positive[:, 0]).mean()',
        "tests/simclr/test_loss.py::test_equals_the_naive_double_loop",
    ),
    Mutation(
        "triplet-margin-of-wrong-sign",
        "simclr/loss.py",
        "F.relu(cosines - positive + margin)",
        "F.relu(cosines - positive - margin)",
        "tests/simclr/test_loss.py::test_the_papers_other_losses",
    ),
    Mutation(
        "all-gather-gradient-not-summed",
        "simclr/collectives.py",
        "dist.reduce_scatter_tensor(mine, grad.contiguous())",
        "mine.copy_(grad.chunk(world_size())[rank()])",
        "tests/simclr/test_ranks.py::test_loss_and_gradient_are_those_of_one_process",
    ),
    Mutation(
        "trust-ratio-inverted",
        "simclr/optim.py",
        "(w > 0) & (g > 0), eta * w / g,",
        "(w > 0) & (g > 0), eta * g / w,",
        "tests/simclr/test_optim.py::test_lars_follows_the_official_trajectory",
    ),
    Mutation(
        "no-warm-up",
        "simclr/optim.py",
        "    if step < warmup_steps:\n        return peak * step / warmup_steps\n",
        "",
        "tests/simclr/test_optim.py::test_schedule_equals_the_official_table",
    ),
    Mutation(
        "batchnorm-decays",
        "simclr/optim.py",
        "return kernel, kernel and not name",
        "return True, kernel and not name",
        "tests/simclr/test_optim.py::test_only_kernels_decay_and_adapt",
    ),
    Mutation(
        "running-variance-unbiased",
        "simclr/networks/batchnorm.py",
        "self.move(mean, var)",
        "count = world_size() * x.numel() // x.shape[1]\n        self.move(mean, var * count / (count - 1))",
        "tests/simclr/networks/test_batchnorm.py::test_running_statistics_move_by_a_tenth_towards_mean_and_biased_variance",
    ),
    Mutation(
        "statistics-move-twice",
        "simclr/gradient_cache.py",
        "        statistics.back()  # only the second pass counts\n",
        "",
        "tests/simclr/test_gradient_cache.py::test_statistics_are_those_of_a_piece_and_move_once",
    ),
    Mutation(
        "statistics-move-by-the-sum-of-the-pieces",
        "simclr/gradient_cache.py",
        "torch._foreach_copy_(self.now, torch._foreach_div(self.moved, float(pieces)))",
        "torch._foreach_copy_(self.now, torch._foreach_sub(self.moved, torch._foreach_mul(self.before, float(pieces - 1))))",
        "tests/simclr/test_gradient_cache.py::test_statistics_are_those_of_a_piece_and_move_once",
    ),
    # ── simclr: data, loop, checkpoints ────────────────────────────────────────────────────────────────────────────
    Mutation(
        "slice-off-by-one",
        "simclr/data/loader.py",
        "order((steps[:, None] * taken + own).ravel())",
        "order((steps[:, None] * taken + 1 + own).ravel())",
        "tests/simclr/data/test_loader.py::test_an_epoch_is_the_keyed_permutation_and_its_images_are_those_of_the_source",
    ),
    Mutation(
        "order-ignores-the-seed",
        "simclr/data/loader.py",
        "keyed.order(config.seed, epoch, len(rows) if ids is None else ids, split.order)",
        "keyed.order(0, epoch, len(rows) if ids is None else ids, split.order)",
        "tests/simclr/data/test_loader.py::test_an_epoch_is_the_keyed_permutation_and_its_images_are_those_of_the_source",
    ),
    Mutation(
        "cuda-without-a-question",
        "simclr/precision.py",
        '    if device.type != "cuda":\n        return\n',
        "",
        "tests/pipelines/train/test_tpu.py::test_what_only_cuda_has_stands_behind_a_question_for_the_device",
    ),
    Mutation(
        "manifest-sizes-not-checked",
        "simclr/data/manifest.py",
        "if size != shard.bytes:",
        "if size < 0:",
        "tests/simclr/data/test_shards.py::test_the_manifest_reads_back_and_names_what_is_wrong",
    ),
    Mutation(
        "resume-one-step-further",
        "simclr/train.py",
        "step = first = state.step",
        "step = first = state.step + 1",
        "tests/simclr/test_train.py::test_stopped_and_resumed_is_bitwise_the_uninterrupted_run",
    ),
    Mutation(
        "checkpoint-without-rename",
        "simclr/checkpoint.py",
        "        scratch.rename(target)\n",
        "        shutil.copytree(scratch, target)\n",
        "tests/simclr/test_checkpoint.py::test_it_is_on_the_disk_before_it_has_its_name",
    ),
    Mutation(
        "checkpoint-not-flushed",
        "simclr/checkpoint.py",
        "        for path in (*scratch.iterdir(), scratch):\n            _flush(path)\n",
        "",
        "tests/simclr/test_checkpoint.py::test_it_is_on_the_disk_before_it_has_its_name",
    ),
    Mutation(
        "checkpoints-name-not-flushed",
        "simclr/checkpoint.py",
        "        _flush(folder)\n",
        "",
        "tests/simclr/test_checkpoint.py::test_it_is_on_the_disk_before_it_has_its_name",
    ),
    Mutation(
        "checksum-not-checked",
        "simclr/checkpoint.py",
        'if digest != text["sha256"]:',
        'if not text["sha256"]:',
        "tests/simclr/test_checkpoint.py::test_a_damaged_one_is_named_and_the_one_before_is_used",
    ),
    Mutation(
        "one-checkpoint-too-many",
        "simclr/checkpoint.py",
        "*sorted(scores, key=order)[-keep:]",
        "*sorted(scores, key=order)[-keep - 1 :]",
        "tests/simclr/test_checkpoint.py::test_the_newest_are_kept_and_a_repeated_step_replaces_the_old",
    ),
    Mutation(
        "s3-tried-once",
        "simclr/data/s3/store.py",
        "attempts: int = 8,",
        "attempts: int = 1,",
        "tests/simclr/data/test_store.py::test_a_request_is_tried_eight_times_with_longer_and_longer_pauses",
    ),
    Mutation(
        "s3-tried-eight-times-without-a-pause",
        "simclr/data/s3/store.py",
        "            self.over.wait(min(self.pause_s * 2 ** (attempt - 1), _PAUSE_MOST_S) * random.uniform(0.5, 1))\n",
        "            pass\n",
        "tests/simclr/data/test_store.py::test_a_request_is_tried_eight_times_with_longer_and_longer_pauses",
    ),
    # ── simclr: methods, evaluation ────────────────────────────────────────────────────────────────────────────────
    Mutation(
        "ring-written-one-batch-further",
        "simclr/methods/queue.py",
        "at = step * len(rows) % len(self.rows)",
        "at = (step + 1) * len(rows) % len(self.rows)",
        "tests/simclr/methods/test_queue.py::test_the_average_and_the_ring",
    ),
    Mutation(
        "teacher-without-temperature",
        "simclr/methods/distill.py",
        "F.softmax(teacher / temperature, 1)",
        "F.softmax(teacher, 1)",
        "tests/simclr/methods/test_distill.py::test_loss_and_gradient_are_the_equations",
    ),
    Mutation(
        "labels-of-the-other-view-turned-round",
        "simclr/methods/online.py",
        "labels = labels.repeat(len(logits) // own)",
        "labels = torch.cat([labels, labels.flip(0)])",
        "tests/simclr/test_train.py::test_an_image_without_a_label_adds_nothing_to_the_linear_evaluation",
    ),
    Mutation(
        "votes-without-temperature",
        "simclr/evaluation/knn.py",
        "((s - s[:, :1]) / temperature).exp()",
        "(s - s[:, :1]).exp()",
        "tests/simclr/evaluation/test_linear.py::test_neighbours_vote_by_their_cosine_over_the_temperature",
    ),
    Mutation(
        "quick-probe-without-decay",
        "simclr/evaluation/linear.py",
        "    weights = start.clone().requires_grad_()\n",
        "    decay, weights = 0.0, start.clone().requires_grad_()\n",
        "tests/simclr/evaluation/test_linear.py::test_the_quick_probes_decay_is_scikit_learns_over_the_rows",
    ),
    Mutation(
        "confusion-transposed",
        "simclr/evaluation/metrics.py",
        "torch.bincount(y * classes + predicted,",
        "torch.bincount(predicted * classes + y,",
        "tests/simclr/evaluation/test_metrics.py::test_confusion_and_accuracy_of_each_class",
    ),
    # ── pipelines ──────────────────────────────────────────────────────────────────────────────────────────────────
    Mutation(
        "outbox-notes-before-it-sends",
        "pipelines/tracking/outbox.py",
        '            self.mlflow.log(batch)\n            files.write_text(self.path / "outbox.json", json.dumps(note) + "\\n")\n',
        '            files.write_text(self.path / "outbox.json", json.dumps(note) + "\\n")\n            self.mlflow.log(batch)\n',
        "tests/pipelines/tracking/test_unlogged.py::test_what_broke_off_on_its_way_is_noted_as_taken_by_nobody",
    ),
    Mutation(
        "hang-counted-from-the-start",
        "pipelines/train/hang.py",
        "            self.moved[rank] = now\n",
        "",
        "tests/pipelines/train/test_hang.py::test_what_takes_its_time_is_no_hang",
    ),
    Mutation(
        "failures-not-counted",
        "pipelines/train/retry.py",
        "            counter.failures += 1\n",
        "",
        "tests/pipelines/train/test_hang.py::test_failures_count_in_a_row_and_a_new_checkpoint_begins_the_row_anew",
    ),
    Mutation(
        "mistakes-of-the-user-tried-again",
        "pipelines/train/retry.py",
        "        if isinstance(error, UserError) and not isinstance(error, Unreachable):\n            return str(error)\n",
        "",
        "tests/pipelines/train/test_hang.py::test_failures_count_in_a_row_and_a_new_checkpoint_begins_the_row_anew",
    ),
    Mutation(
        "given-weights-not-in-the-runs-name",
        "pipelines/runs/directory.py",
        '*([start["sha256"]] if start else [])',
        "*list[str]()",
        "tests/pipelines/train/test_warm_start.py::test_the_directory_tells_starts_apart",
    ),
    Mutation(
        "fewer-workers-than-groups-of-shards",
        "pipelines/train/resources.py",
        "if retry.shares(config, count)]",
        "if count]",
        "tests/pipelines/train/test_hang.py::test_every_number_of_workers_between_two_may_share_a_batch",
    ),
    Mutation(
        "checkpoint-shares-memory-with-the-training",
        "pipelines/train/checkpoints.py",
        'tensor.detach().to("cpu", copy=True)',
        'tensor.detach().to("cpu")',
        "tests/pipelines/train/test_checkpoints.py::test_what_is_written_is_what_it_was",
    ),
    Mutation(
        "checkpoint-in-s3-announced-before-its-weights",
        "pipelines/runs/home.py",
        '        self.store.upload(path / "state.safetensors", there / "state.safetensors", _sha256(text, path))\n'
        "        self.require()  # sending gigabytes takes minutes\n"
        '        self.store.upload(path / "checkpoint.json", there / "checkpoint.json")\n',
        '        self.store.upload(path / "checkpoint.json", there / "checkpoint.json")\n'
        "        self.require()  # sending gigabytes takes minutes\n"
        '        self.store.upload(path / "state.safetensors", there / "state.safetensors", _sha256(text, path))\n',
        "tests/pipelines/runs/test_sync.py::test_a_checkpoint_is_there_when_all_of_it_is",
    ),
    Mutation(
        "curve-without-its-last-point",
        "pipelines/html/charts.py",
        "    keep = thin(y)\n",
        "    keep = thin(y)[:-1] if len(y) > 1 else thin(y)\n",
        "tests/pipelines/html/test_page.py",
    ),
    Mutation(
        "dashboard-open-to-all",
        "pipelines/clusterfile/rules.py",
        'if host and host[1] not in ("127.0.0.1", "localhost"):',
        'if host and host[1] == "":',
        "tests/pipelines/clusterfile/test_rules.py::test_each_mistake_has_its_sentence",
    ),
    Mutation(
        "bench-counts-its-warm-steps",
        "pipelines/bench/loader.py",
        "return (steps - WARM_STEPS) * batch_size / seconds",
        "return steps * batch_size / seconds",
        "tests/pipelines/bench/test_bench.py::test_the_loaders_rate_is_of_the_batches_behind_the_warm_ones",
    ),
    # ── tune ───────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutation(
        "samples-outside-their-range",
        "tune/resolve.py",
        "return Peak(math.exp(draw.uniform(math.log(low), math.log(high))))",
        "return Peak(math.exp(draw.uniform(math.log(low), math.log(2 * high))))",
        "tests/tune/test_spaces.py::test_samples_are_the_same_for_a_seed_and_inside_their_bounds",
    ),
    Mutation(
        "peak-scaled-by-the-wrong-rule",
        "tune/resolve.py",
        "shares[recipe.optim.scaling] / shares[trial.optim.scaling]",
        "shares[recipe.optim.scaling] / shares[recipe.optim.scaling]",
        "tests/tune/test_spaces.py::test_both_scaling_rules_agree_at_the_recipes_batch",
    ),
    Mutation(
        "label-free-scores-ranked-upside-down",
        "tune/report.py",
        'sign = 1 if METRICS[metric] == "max" else -1',
        "sign = 1",
        "tests/tune/test_paper_figures.py::test_temperature_and_learning_rate",
    ),
    Mutation(
        "error-bars-without-the-best-seed",
        "tune/drawing.py",
        "low=min(means), high=max(means)",
        "low=min(means), high=sorted(means)[-2:][0]",
        "tests/tune/test_paper_figures.py::test_temperature_and_learning_rate",
    ),
    Mutation(
        "figure-without-the-first-trial",
        "tune/paper_figures.py",
        "        for trial in self.trials:\n",
        "        for trial in self.trials[1:]:\n",
        "tests/tune/test_paper_figures.py::test_every_space_has_its_figure",
    ),
)
