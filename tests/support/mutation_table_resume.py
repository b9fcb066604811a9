"""Ways to break sweeps that go on, leases, and what keeps pickles from being read: see `tests.support.mutation_table`."""

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
        "late-checkpoint-not-refused",
        "pipelines/runs/home.py",
        "            lease.require(self.register(), self.ticket.owner, str(self.at))\n",
        "            pass\n",
        "tests/pipelines/runs/test_lease.py::test_the_late_checkpoint_of_a_former_writer_is_rejected_and_removes_none",
    ),
    Mutation(
        "checkpoints-ordered-by-step-alone",
        "simclr/checkpoint.py",
        "return (int(found[2] or 0), int(found[1])) if found",
        "return (0, int(found[1])) if found",
        "tests/pipelines/runs/test_lease.py::test_checkpoints_without_a_token_are_older_than_those_with_one",
    ),
    Mutation(
        "lease-written-without-condition",
        "simclr/data/s3/lease.py",
        'condition = {} if not self.conditional else {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}',
        "condition: dict[str, str] = {}",
        "tests/pipelines/runs/test_lease.py::test_a_second_is_refused_with_host_and_age_and_takes_over_once_the_first_ends",
    ),
)
