"""Ways to break what features are used for, and trainings on a subset: see `tests.support.mutation_table`."""

from __future__ import annotations

from tests.support.mutation import Mutation

USES = (
    Mutation(
        "a-subset-not-in-the-runs-name",
        "pipelines/runs/directory.py",
        """*([f"subset {subset['sha256']}"] if subset else [])""",
        "*list[str]()",
        "tests/pipelines/train/test_subset.py::test_a_run_trains_on_the_listed_images_alone",
    ),
    Mutation(
        "a-run-that-does-not-look-at-its-subset",
        "pipelines/runs/directory.py",
        'if run.subset.get("sha256") != subset.get("sha256"):',
        "if False:",
        "tests/pipelines/train/test_subset.py::test_a_run_trains_on_the_listed_images_alone",
    ),
    Mutation(
        "an-extension-that-sees-all-images",
        "pipelines/commands/pretrain.py",
        "kept = run.path / subset.FILE if run.subset else None",
        "kept = None",
        "tests/pipelines/train/test_subset.py::test_an_extension_sees_the_images_of_its_run",
    ),
    Mutation(
        "cosines-of-two-encoders",
        "pipelines/evaluation/query.py",
        "if (digest := weights_digest(directory)) != about.encoder:",
        'if (digest := weights_digest(directory)) == "":',
        "tests/pipelines/commands/test_neighbours.py::test_what_does_not_fit_is_refused",
    ),
    Mutation(
        "rows-nearer-than-those-that-compete",
        "simclr/evaluation/curation.py",
        "(chosen and near[i] >= others)",
        "False",
        "tests/simclr/evaluation/test_search.py::test_the_farthest_is_chosen_each_time",
    ),
    Mutation(
        "features-that-name-pictures-elsewhere",
        "pipelines/evaluation/originals.py",
        'return bool(path) and not parts.is_absolute() and ".." not in parts.parts',
        "return True",
        "tests/pipelines/commands/test_neighbours.py::test_pictures_of_any_source_are_found_again",
    ),
)
