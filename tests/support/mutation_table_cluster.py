"""Ways to break what sets nodes up and what is said of a cluster before it costs money: see `tests.support.mutation_table`."""

from __future__ import annotations

from tests.support.mutation import Mutation

CLUSTER = (
    Mutation(
        "damaged-environment-unpacked",
        "cluster/environment.py",
        'if (found := sha256(archive)) != note["sha256"]:',
        "if not (found := sha256(archive)):",
        "tests/cluster/test_environment.py::test_a_damaged_archive_is_not_unpacked",
    ),
    Mutation(
        "kept-environment-overwritten",
        "cluster/environment.py",
        'Body=body, IfNoneMatch="*", **self.own',
        "Body=body, **self.own",
        "tests/cluster/test_environment.py::test_two_that_keep_at_once_leave_one_whole_environment",
    ),
    Mutation(
        "quota-of-spot-machines-not-asked",
        "pipelines/clusterfile/quotas.py",
        '("L-417A185B", "L-C4BD4855")',
        '("L-417A185B", "L-7212CCBC")',
        "tests/pipelines/clusterfile/test_quotas.py::test_each_family_and_each_way_to_pay_has_a_quota_of_its_own",
    ),
)
