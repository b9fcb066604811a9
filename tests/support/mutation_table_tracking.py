"""Ways to give credentials away, and to print what a terminal obeys; the rest stands in `mutation_table`."""

from __future__ import annotations

from tests.support.mutation import Mutation

TRACKING = (
    Mutation(
        "an-address-in-a-run-gets-the-token",
        "pipelines/tracking/trust.py",
        "    elif held := secrets():\n",
        "    elif (held := secrets()) and False:\n",
        "tests/pipelines/tracking/test_trust.py::test_an_address_in_a_run_gets_no_credentials",
    ),
    Mutation(
        "a-database-in-a-run-is-opened",
        "pipelines/tracking/trust.py",
        "if not _holds(file, run.tracking_run):",
        "if False:",
        "tests/pipelines/tracking/test_trust.py::test_a_database_in_a_run_is_one_that_knows_it",
    ),
    Mutation(
        "the-user-in-an-address-is-dropped-before-hosts-are-compared",
        "pipelines/tracking/trust.py",
        'there = _server(place.partition("://")[2], ',
        'there = _server(place.partition("://")[2].partition("/")[0].rpartition("@")[2], ',
        "tests/pipelines/tracking/test_trust.py::test_a_version_elsewhere_gets_no_credentials",
    ),
    Mutation(
        "all-files-of-a-version-come",
        "pipelines/tracking/registry.py",
        "if name in FILES and not info.is_dir:",
        "if not info.is_dir:",
        "tests/pipelines/tracking/test_trust.py::test_only_the_files_of_an_encoder_come",
    ),
    Mutation(
        "a-download-goes-on-after-its-refusal",
        "pipelines/tracking/registry.py",
        "            _cut(to)\n",
        "",
        "tests/pipelines/tracking/test_trust.py::test_a_stream_without_an_end_is_left",
    ),
    Mutation(
        "c1-control-characters-pass",
        "simclr/text.py",
        'if c.isprintable() or unicodedata.category(c) == "Zs" or _joins(line, i)',
        'if c.isprintable() or c > "\\x7f"',
        "tests/simclr/test_text.py::test_no_sign_that_a_terminal_obeys_passes",
    ),
    Mutation(
        "a-joiner-passes-anywhere",
        "simclr/text.py",
        "_joinable(line[i - 1]) and _joinable(line[i + 1])",
        "True",
        "tests/simclr/test_text.py::test_joiners_stay_where_they_show",
    ),
    Mutation(
        "a-formula-behind-a-semicolon-passes",
        "simclr/text.py",
        '_LATER_FORMULA.sub(r"\\1\'", printable(str(value)))',
        "printable(str(value))",
        "tests/simclr/test_text.py::test_no_cell_is_a_formula_where_another_sign_separates",
    ),
    Mutation(
        "the-parser-prints-words-as-they-are",
        "pipelines/terminal.py",
        'print(printable_lines(_COLOUR.sub("", held.getvalue()))',
        'print((_COLOUR.sub("", held.getvalue()))',
        "tests/pipelines/test_terminal.py::test_a_word_that_the_parser_complains_of",
    ),
    Mutation(
        "a-run-of-another-place-is-taken-as-known",
        "pipelines/tracking/outbox.py",
        "if not client.has_run(uri, run.tracking_run):",
        "if False:",
        "tests/pipelines/tracking/test_promote.py::test_a_run_of_the_local_database_is_published_at_another_address",
    ),
    Mutation(
        "a-plugin-named-by-a-run-gets-a-login",
        "pipelines/tracking/trust.py",
        'elif not there.lower().startswith(("http://", "https://")):',
        "elif False:",
        "tests/pipelines/tracking/test_trust.py::test_what_has_a_login_of_its_own_is_asked_about",
    ),
    Mutation(
        "files-without-a-version-stay",
        "pipelines/tracking/version.py",
        "            server.remove(uri, place)\n",
        "            pass\n",
        "tests/pipelines/tracking/test_version.py::test_an_upload_that_fails_leaves_nothing",
    ),
    Mutation(
        "a-version-that-was-asked-for-twice-stays-twice",
        "pipelines/tracking/version.py",
        "if version.source == source and int(version.version) != number:",
        "if False:",
        "tests/pipelines/tracking/test_version.py::test_a_version_that_was_asked_for_twice_is_one",
    ),
    Mutation(
        "weights-wait-no-longer-than-an-answer",
        "pipelines/tracking/server.py",
        "math.ceil(size / SLOWEST)",
        "0",
        "tests/pipelines/tracking/test_server.py::test_an_upload_has_time_by_its_size",
    ),
    Mutation(
        "timm-pads-its-pool-on-every-side",
        "simclr/encoder/timm.py",
        '"preact": False, "stem_type": "same"',
        '"preact": False',
        "tests/simclr/encoder/test_timm.py::test_timm_computes_the_same",
    ),
    Mutation(
        "a-name-of-an-image-is-a-formula",
        "simclr/data/copies.py",
        "[*map(cell, row)]",
        "[*row]",
        "tests/pipelines/test_terminal.py::test_a_folder_of_evil_names",
    ),
)
