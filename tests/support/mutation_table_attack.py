"""Ways to break what keeps others out; the rest stands in `mutation_table`."""

from __future__ import annotations

from tests.support.mutation import Mutation

ATTACK = (
    Mutation(
        "private-ray-on-every-address",
        "pipelines/train/ray_private.py",
        '(ray_constants, "ENABLE_RAY_CLUSTER", False)',
        '(ray_constants, "ENABLE_RAY_CLUSTER", True)',
        "tests/pipelines/train/test_own_ray.py::test_the_suites_ray_listens_on_the_loopback_and_its_folder_is_closed",
    ),
    Mutation(
        "living-commands-folder-removed",
        "pipelines/train/own_ray.py",
        "        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "        pass",
        "tests/pipelines/train/test_own_ray.py::test_a_start_removes_what_killed_commands_left_and_nothing_else",
    ),
    Mutation(
        "folder-used-that-another-start-removes",
        "pipelines/train/own_ray.py",
        "    except BlockingIOError:\n        return False",
        "    except BlockingIOError:\n        return True",
        "tests/pipelines/train/test_own_ray.py::test_a_folder_that_another_start_takes_away_is_not_used",
    ),
    Mutation(
        "any-connected-ray-is-private",
        "pipelines/train/ray_train.py",
        "private = own_ray.begun()",
        "private = True",
        "tests/pipelines/train/test_connect.py::test_only_the_ray_that_we_started_is_private",
    ),
    Mutation(
        "groups-meet-in-one-file",
        "pipelines/train/ray_start.py",
        "torch-{uuid.uuid4().hex}",
        "torch",
        "tests/pipelines/train/test_connect.py::test_each_group_of_workers_meets_in_a_file_of_its_own",
    ),
    Mutation(
        "ranks-wait-for-one-that-has-raised",
        "simclr/collectives.py",
        "        if world_size() == 1:\n            raise\n        return",
        "        if world_size() > 0:\n            raise\n        return",
        "tests/simclr/test_collectives.py::test_one_ranks_value_that_is_no_json_is_an_error_on_every_rank",
    ),
    Mutation(
        "ranks-take-any-size",
        "simclr/collectives.py",
        "if not 0 < size <= _MOST_BYTES",
        "if size < 0",
        "tests/simclr/test_collectives.py::test_what_is_no_json_is_an_error_on_every_rank_and_never_runs",
    ),
)
