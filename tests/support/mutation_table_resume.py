"""Ways to break sweeps that go on, what keeps pickles from being read, and the watch over workers: see `tests.support.mutation_table`."""

from __future__ import annotations

from tests.support.mutation import Mutation

RESUME = (
    Mutation(
        "a-rule-that-hears-steps-twice",
        "tune/schedulers.py",
        "if name in self._at and time <= self._at[name][self._clock]:",
        "if False:",
        "tests/tune/test_resume.py::test_a_rule_decides_as_if_the_sweep_had_not_stopped",
    ),
    Mutation(
        "a-rule-without-memory",
        "tune/schedulers.py",
        'if "score" in line:',
        "if False:",
        "tests/tune/test_resume.py::test_a_rule_decides_as_if_the_sweep_had_not_stopped",
    ),
    Mutation(
        "a-trial-whose-name-is-a-path",
        "tune/sweep_dir.py",
        "if trial.name != directory.name:",
        "if False:",
        "tests/tune/test_strangers.py::test_records_that_lead_elsewhere_are_refused",
    ),
    Mutation(
        "anothers-weights-with-the-own-values",
        "tune/inherit.py",
        'if checkpoints.is_dir() and load_run(directory).config == Config.from_dict(note["config"]):',
        "if checkpoints.is_dir():",
        "tests/tune/test_inherit.py::test_a_trial_killed_at_any_point_has_weights_that_fit_its_values",
    ),
    Mutation(
        "a-name-for-two-trials",
        "tune/ray_tune.py",
        "waiting.remove(own)",
        "pass",
        "tests/tune/test_resume.py::test_a_name_is_of_one_trial",
    ),
    Mutation(
        "a-rule-that-hears-strangers",
        "tune/schedulers.py",
        'lines = [line for line in lines if line["trial"] in names]',
        "pass",
        "tests/tune/test_resume.py::test_reports_of_other_trials_and_of_no_size_are_not_heard",
    ),
    Mutation(
        "a-small-job-overtakes",
        "pipelines/train/waiting.py",
        'mine["goes"] or (not before and ',
        'mine["goes"] or (',
        "tests/pipelines/train/test_waiting.py::test_who_asked_first_goes_first",
    ),
    Mutation(
        "room-of-a-group-that-starts-again",
        "pipelines/train/waiting.py",
        "for t in [*going, mine])",
        "for t in [mine])",
        "tests/pipelines/train/test_waiting.py::test_a_group_that_starts_again_keeps_its_room",
    ),
    Mutation(
        "records-of-an-earlier-sweep",
        "tune/mirror.py",
        'if self._is_of_another_sweep(there.get("sweep.json"), notes):',
        "if False:",
        "tests/tune/test_mirror.py::test_a_copy_of_an_earlier_sweep_at_the_address_goes",
    ),
    Mutation(
        "checkpoints-of-the-first-try",
        "tune/trial.py",
        "sync.retry_unreachable(lambda: mirror.remove(at, Store()), say)",
        "pass",
        "tests/tune/test_mirror.py::test_a_trial_that_begins_again_has_no_checkpoint_of_its_first_try",
    ),
    Mutation(
        "a-sweep-that-two-run",
        "tune/sweep_dir.py",
        "stack.enter_context(files.locked(self.path / LOCK, wait=False))",
        "(self.path / LOCK).touch()",
        "tests/tune/test_sweep.py::test_two_commands_do_not_run_one_sweep",
    ),
    Mutation(
        "torchs-cache-is-anybodys",
        "simclr/compiling.py",
        "return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & files.OTHERS_WRITE",
        "return True",
        "tests/simclr/test_compiling.py::test_torch_has_a_cache_of_this_user_alone",
    ),
    Mutation(
        "a-controller-that-slept-has-seen-hangs",
        "pipelines/train/hang.py",
        "min(max(now - self.last, 0.0), self.most)",
        "max(now - self.last, 0.0)",
        "tests/pipelines/train/test_hang.py::test_a_controller_that_slept_has_seen_no_hang",
    ),
    Mutation(
        "who-waits-for-a-lock-hangs",
        "pipelines/train/hang.py",
        '"lock": math.inf,',
        '"lock": 1,',
        "tests/pipelines/train/test_hang.py::test_a_rank_is_found_in_every_phase_after_its_own_patience",
    ),
    Mutation(
        "a-rank-alone-is-not-found",
        "pipelines/train/hang.py",
        '_ALONE = ("import", "fetch", "upload")',
        "_ALONE: tuple[str, ...] = ()",
        "tests/pipelines/train/test_hang.py::test_who_is_alone_in_a_phase_is_found_while_others_go_on",
    ),
    Mutation(
        "too-little-memory-tried-to-the-end",
        "pipelines/train/retry.py",
        "if hang.group.short > 1:",
        "if hang.group.short > 99:",
        "tests/pipelines/train/test_memory.py::test_the_same_place_is_tried_twice",
    ),
)
