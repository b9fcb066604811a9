"""Who gets the credentials that the environment holds for MLflow, and whose files come: attacks by a run directory and by a registry that
somebody else wrote to."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipelines.runs.directory import load_run, open_run
from pipelines.runs.scores import TEST, WHOLE, Measured, stated
from pipelines.tracking import outbox, registry, trust
from pipelines.tracking import uri as mlflow_uri
from pipelines.tracking.client import MLflowRun
from pipelines.tracking.record import Record
from simclr.errors import UserError
from simclr.recipes import recipe
from tests.support.command import Run, refused
from tests.support.ears import Ears

TOKEN = "a-token-of-the-user"


@pytest.fixture
def ears() -> Iterator[Ears]:
    ears = Ears()
    yield ears
    ears.stop()


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)


def a_run(folder: Path, patterns: Path, tracking_uri: str, tracking_run: str = "ab12") -> Path:
    """An evaluated run without weights, whose run.json says that MLflow at `tracking_uri` knows it."""
    open_run(folder, "patterns_tiny", recipe("patterns_tiny"), patterns).save()
    text = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(text | {"tracking_uri": tracking_uri, "tracking_run": tracking_run}))
    scored = {"k": 5, "scores": [{"name": "trained", "knn_top1": 0.5, "probe_top1": 0.5}]}
    scored |= stated(Measured(data="data/photos", shards_sha256="ab" * 32, limit=WHOLE, split=TEST))
    (folder / "evaluation.json").write_text(json.dumps(scored))
    return folder


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory, database_in: Callable[[Path], str]) -> MLflowRun:
    """A run in a database of the user's, in project/runs."""
    run = MLflowRun(database_in(tmp_path_factory.mktemp("project") / "runs"), "patterns", "mine", {}, {})
    run.end()
    return run


def an_encoder(folder: Path) -> Path:
    from simclr.encoder.directory import write_encoder
    from simclr.methods.simclr import build_model

    config = recipe("patterns_tiny")
    write_encoder(build_model(config).encoder.state_dict(), config, folder, {"recipe": "patterns_tiny", "step": 0, "data": "patterns"})
    return folder


# ── A run directory of somebody else ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("held", "named"),
    [
        ({"MLFLOW_TRACKING_TOKEN": TOKEN}, r"\$MLFLOW_TRACKING_TOKEN"),
        (
            {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "mine"},
            r"\$MLFLOW_TRACKING_USERNAME or \$MLFLOW_TRACKING_PASSWORD",
        ),
        ({}, r"\.mlflow/credentials"),
    ],
    ids=["token", "password", "file"],
)
def test_an_address_in_a_run_gets_no_credentials(
    simclr: Run, ears: Ears, tmp_path: Path, patterns: Path, monkeypatch: pytest.MonkeyPatch, held: dict[str, str], named: str
) -> None:
    run = a_run(tmp_path / "theirs", patterns, ears.uri)
    for name, value in held.items():
        monkeypatch.setenv(name, value)
    if not held:
        file = Path("~/.mlflow/credentials").expanduser()
        file.parent.mkdir()
        file.write_text("[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = mine\n")
    refused(simclr("publish", run), f"was logged at {ears.uri}, as its run.json says", f"{named} holds", "--tracking-uri")
    assert ears.heard == []


def test_the_users_address_is_asked_and_the_one_in_a_run_is_not(
    simclr: Run, ears: Ears, tmp_path: Path, patterns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mine = a_run(tmp_path / "theirs", patterns, ears.uri), Ears()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mine.uri.replace("//", "//me:secret@"))
    _, _, said = found = simclr("publish", run)
    refused(found, "is no published encoder")
    assert ears.heard == [] and mine.heard and "secret" not in said
    mine.stop()


def test_without_credentials_the_address_in_a_run_is_followed(simclr: Run, ears: Ears, tmp_path: Path, patterns: Path) -> None:
    """One command publishes a run that was logged at a server without a login, wherever the command is given."""
    simclr("publish", a_run(tmp_path / "theirs", patterns, ears.uri))
    assert ears.heard and not ears.told


def test_an_address_that_the_user_gives_gets_them(simclr: Run, ears: Ears, token: None, tmp_path: Path, patterns: Path) -> None:
    simclr("publish", a_run(tmp_path / "theirs", patterns, ears.uri), "--tracking-uri", ears.uri)
    assert set(ears.told) == {f"Bearer {TOKEN}"}


def test_a_server_that_has_moved(ears: Ears, token: None, tmp_path: Path, patterns: Path) -> None:
    """The address that the user gives is asked for the run; where it has it, the run goes on there, and is noted."""
    run, ears.runs = load_run(a_run(tmp_path / "run", patterns, "http://10.0.0.5:5000")), ["ab12"]
    assert outbox.logged_at(run, f"{ears.uri}/")[1] == "ab12"
    assert load_run(run.path).tracking_uri == f"{ears.uri}/"
    ears.heard.clear()
    assert outbox.logged_at(load_run(run.path), ears.uri)[1] == "ab12" and not ears.heard  # the same address, which needs no question


@pytest.mark.parametrize("there", ["databricks", "arn:aws:sagemaker:us-east-1:1:mlflow-tracking-server/x", "postgresql://host/mlflow"])
def test_what_has_a_login_of_its_own_is_asked_about(simclr: Run, tmp_path: Path, patterns: Path, there: str) -> None:
    refused(simclr("publish", a_run(tmp_path / "theirs", patterns, there)), f"was logged at {there}, .* a login of yours", "--tracking-uri")


def test_an_address_in_another_spelling_is_the_same() -> None:
    for one, other in (
        ("http://Host:80/", "http://host"),
        ("HTTPS://me:pw@host:443/mlflow/", "https://host/mlflow"),
        ("http://…@host:5000", "http://host:5000"),
        ("sqlite:////x/mlflow.db", "sqlite:////x/mlflow.db"),
    ):
        assert mlflow_uri.same_server(one, other)
    for one, other in (
        ("http://host", "https://host"),
        ("http://host:443", "http://host"),
        ("http://host/a", "http://host/A"),
        ("http://host:50000", "http://host:5000"),
        ("sqlite:////x/M.db", "sqlite:////x/m.db"),
    ):
        assert not mlflow_uri.same_server(one, other)


def test_no_other_command_asks_the_address_in_a_run(simclr: Run, ears: Ears, token: None, tmp_path: Path, patterns: Path) -> None:
    from pipelines.evaluation import inputs
    from pipelines.train import driver

    run = a_run(tmp_path / "theirs", patterns, ears.uri)
    for command in (("report", run), ("runs", tmp_path)):
        assert simclr(*command)[0] == 0
    with inputs.opened(run, None) as directory, pytest.raises(UserError, match="has no encoder yet"):
        inputs.resolve(directory, None)
    # To go on with a run is one command: it logs where the user logs, under a new MLflow run if that is elsewhere.
    known, _, at = driver.home_of(run, "patterns_tiny", recipe("patterns_tiny"), patterns, patterns, None, alone=ExitStack())
    assert known.tracking_uri == ears.uri and at == mlflow_uri.default_uri(tmp_path / "runs") and ears.heard == []


def test_a_database_in_a_run_is_one_that_knows_it(simclr: Run, mine: MLflowRun, tmp_path: Path, patterns: Path) -> None:
    """MLflow makes its tables in whatever database it is given: a browser's, say."""
    other = tmp_path / "cookies.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE cookies (name TEXT)")
    before = other.read_bytes()
    (tmp_path / "somewhere").mkdir()
    for place in (other, tmp_path / "somewhere" / "new.db"):
        run = a_run(tmp_path / place.stem, patterns, f"sqlite:///{place}")
        an_encoder(run / "encoder")
        refused(simclr("publish", run), f"was logged at sqlite:///{place}.*is no database of yours with that run in it", "--tracking-uri")
    assert other.read_bytes() == before and not any((tmp_path / "somewhere").iterdir())
    run = a_run(tmp_path / "moved" / "run", patterns, mine._uri, mine.run_id)
    an_encoder(run / "encoder")
    assert simclr("publish", run, "--name", "photos", "--force")[:2] == (0, "photos/1 @champion\n")  # one's own, from any folder
    assert load_run(run).registered == "photos/1"


def test_credentials_in_a_run_of_before_are_not_shown(tmp_path: Path, patterns: Path) -> None:
    run = load_run(a_run(tmp_path / "old", patterns, "http://me:secret@host/mlflow?token=abc"))
    assert run.tracking_uri == "http://…@host/mlflow?token=…"


def test_a_redirect_takes_no_credentials_along(ears: Ears, token: None) -> None:
    """`requests` sees to it, for our own request and for MLflow's."""
    from mlflow.tracking import MlflowClient

    ours = Ears(elsewhere=ears.uri)
    mlflow_uri.check(ours.uri)
    MlflowClient(ours.uri, ours.uri).search_experiments()
    ours.stop()
    assert len(ours.told) == 2 and len(ears.heard) == 2 and not ears.told


# ── A registry that somebody else writes to ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "source",
    [
        "http://127.0.0.1:{port}/api/2.0/mlflow-artifacts/artifacts/x",
        "HTTP://127.0.0.1:{port}/api/2.0/mlflow-artifacts/artifacts/x",
        "mlflow-artifacts://127.0.0.1:{port}/x",
        "http://127.0.0.1:{port}\\@127.0.0.1:{ours}/api/2.0/mlflow-artifacts/artifacts/x",  # urllib and urllib3 read it each in its way
        "http://127.0.0.1:{ours}@127.0.0.1:{port}/api/2.0/mlflow-artifacts/artifacts/x",
        " http://127.0.0.1:{port}/api/2.0/mlflow-artifacts/artifacts/x",
        "h\tttp://127.0.0.1:{port}/api/2.0/mlflow-artifacts/artifacts/x",
        "runs:/ab12/x",
        "models:/m/1",
    ],
)
def test_a_version_elsewhere_gets_no_credentials(ears: Ears, token: None, tmp_path: Path, source: str) -> None:
    ours = Ears(source.format(port=ears.server_port, ours=0))
    ours.source = source.format(port=ears.server_port, ours=ours.server_port)
    with pytest.raises(UserError, match=r"another server than MLflow's|is no place of files"):
        registry.pull(ours.uri, "m/1", tmp_path / "new")
    ours.stop()
    assert ours.told and ears.heard == [] and not any(tmp_path.iterdir())


def test_a_version_elsewhere_is_fetched_without_credentials(ears: Ears, tmp_path: Path) -> None:
    ears.files = {"encoder.safetensors": (3, b"abc"), "config.json": (2, b"{}")}
    ours = Ears(f"mlflow-artifacts://127.0.0.1:{ears.server_port}/x")
    registry.pull(ours.uri, "m/1", tmp_path / "new")
    ours.stop()
    assert (tmp_path / "new" / "config.json").read_bytes() == b"{}" and not ears.told


def test_a_folder_that_a_server_elsewhere_names_is_not_read(tmp_path: Path) -> None:
    for place in ("/home/me/secret", "file:///home/me/secret", "FILE:/home/me/secret"):
        with pytest.raises(UserError, match=r"a folder of its server's machine, /home/me/secret.*use /home/me/secret/encoder as it is"):
            trust.folder_of("https://me:pw@mlflow.example", place, "m/1")
        assert trust.folder_of("http://127.0.0.1:5000", place, "m/1") == Path("/home/me/secret")
    assert trust.folder_of("https://mlflow.example", "s3://bucket/key", "m/1") is None
    assert trust.folder_of("sqlite:////x/mlflow.db", "file:///runs%20of%2050%20%25", "m/1") == Path("/runs of 50 %")


def test_a_path_on_mlflows_own_server_needs_no_slash(ears: Ears, token: None, tmp_path: Path) -> None:
    ears.source, ears.files = "mlflow-artifacts:x", {"encoder.safetensors": (3, b"abc"), "config.json": (2, b"{}")}
    registry.pull(ears.uri, "m/1", tmp_path / "new")
    assert (tmp_path / "new" / "config.json").read_bytes() == b"{}"


def test_the_way_out_fits_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "http://files.example/x"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    with pytest.raises(UserError, match=r"put the credentials into the address instead"):
        trust.require_same_host("http://mlflow.example", place, "m/1")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"start MLflow's server with --serve-artifacts"):
        trust.require_same_host("http://mlflow.example", place, "m/1")


def test_a_folder_that_a_server_elsewhere_has_written_to_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    trust.say_folder("https://me:pw@mlflow.example", "file:///srv/mlruns/1")
    assert "https://…@mlflow.example has files written to /srv/mlruns/1 of this machine; if that is no disk" in capsys.readouterr().err
    for uri, place in (("http://127.0.0.1:5000", "/srv/1"), ("sqlite:////x/mlflow.db", "/srv/1"), ("https://mlflow.example", "s3://b/k")):
        trust.say_folder(uri, place)
    assert capsys.readouterr().err == ""


def test_the_line_of_a_server_may_be_long() -> None:
    from mlflow.exceptions import MlflowException

    from pipelines.tracking.client import one_sentence

    began = time.process_time()
    with pytest.raises(UserError) as refusal, one_sentence("http://host"):
        raise MlflowException("://" * 30_000)
    with pytest.raises(UserError) as elsewhere:
        trust.require_same_host("http://host", "runs:" + "/x" * 30_000, "m/1")
    assert len(str(refusal.value)) < 500 and len(str(elsewhere.value)) < 4_200 and time.process_time() - began < 1


@pytest.mark.parametrize(("name", "found"), [("a@b", "it has @;"), ("m\x1b[2J", "it has signs that are not seen;"), ("..", "no letter")])
def test_the_name_of_a_model_says_what_is_wrong_with_it(name: str, found: str) -> None:
    with pytest.raises(UserError, match=rf"cannot be registered, it has {found}|{found}"):
        registry.require_name(name)


def test_names_of_every_script_name_models(mine: MLflowRun, tmp_path: Path) -> None:
    name = "می\u200cخواهم 👩\u200d🔬"
    assert registry.register(mine._uri, mine.run_id, an_encoder(tmp_path / "encoder"), name, Record()) == 1
    assert registry.pull(mine._uri, f"{name}/1", tmp_path / "new")["name"] == name


def test_only_the_files_of_an_encoder_come(ears: Ears, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ears.files = {"encoder.safetensors": (3, b"abc"), "config.json": (2, b"{}"), "README.md": (None, b"# m\n")}
    ears.files |= dict.fromkeys(("model.pkl", ".bashrc", "a\x1b]0;pwned\x07", "sitecustomize.py"), (1, b"x"))
    ears.tags = {"score.knn_top1": "0.5", "score.odd": "many", "score.nan": "nan", "other": "1"}
    got = registry.pull(ears.uri, "m/1", tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["README.md", "config.json", "encoder.safetensors"]
    said = capsys.readouterr().err
    assert said == "left out of m/1, since no encoder has such files: .bashrc, a%1b]0;pwned%07, model.pkl and 1 more\n"  # by MLflow
    assert got["scores"] == {"knn_top1": 0.5}


@pytest.mark.parametrize(
    ("listed", "sent", "sentence"),
    [(10, b"x" * (64 << 20), "sends more bytes than the 12 that it lists"), (10, b"xxx", "has 3 bytes, 10 are listed")],
    ids=["more", "fewer"],
)
def test_no_more_and_no_fewer_bytes_than_are_listed(ears: Ears, tmp_path: Path, listed: int, sent: bytes, sentence: str) -> None:
    ears.files = {"encoder.safetensors": (listed, sent), "config.json": (2, b"{}")}
    with pytest.raises(UserError, match=sentence):
        registry.pull(ears.uri, "m/1", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_stream_without_an_end_is_left(ears: Ears, tmp_path: Path) -> None:
    ears.files, ears.endless = {"encoder.safetensors": (10, bytes(1 << 20)), "config.json": (2, b"{}")}, True
    began = time.monotonic()
    with pytest.raises(UserError, match="sends more bytes than the 12 that it lists"):
        registry.pull(ears.uri, "m/1", tmp_path / "new")
    assert time.monotonic() - began < 10 and not (tmp_path / "new").exists()
    before = 0
    while before != ears.sent:  # MLflow's thread ends, too: the server has nobody to send to
        before = ears.sent
        assert time.monotonic() - began < 20
        time.sleep(0.2)


def test_more_than_the_disk_holds_is_refused_before(ears: Ears, tmp_path: Path) -> None:
    ears.files = {"encoder.safetensors": (1 << 60, b""), "config.json": (2, b"{}")}
    with pytest.raises(UserError, match=r"no space left on the disk of .* for m/1; free some, or use another --to"):
        registry.pull(ears.uri, "m/1", tmp_path / "new")


def test_links_are_neither_published_nor_pulled(mine: MLflowRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run directory may be somebody else's: a link in it would publish a file of ours."""
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE KEY")
    uri, encoder = mine._uri, an_encoder(tmp_path / "encoder")
    (encoder / "notes.txt").symlink_to(secret)
    assert registry.register(uri, mine.run_id, encoder, "linked", Record()) == 1
    folder = Path(mine._mlflow.get_model_version("linked", "1").source.removeprefix("file://")) / "encoder"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "encoder.safetensors"]
    (encoder / "head.safetensors").symlink_to(secret)
    with pytest.raises(UserError, match=r"head\.safetensors is no plain file"):
        registry.register(uri, mine.run_id, encoder, "linked", Record())
    (folder / "a\x1b]0;pwned\x07").write_text("x")
    registry.pull(uri, "linked/1", tmp_path / "plain")
    assert "has such files: a\\x1b]0;pwned\\x07\n" in capsys.readouterr().err
    (folder / "head.safetensors").symlink_to(secret)
    with pytest.raises(UserError, match="linked/1 has links among its files"):
        registry.pull(uri, "linked/1", tmp_path / "new")
    with pytest.raises(UserError, match="cannot be registered"):
        registry.register(uri, mine.run_id, encoder, "m\x1b[2J", Record())


def test_the_files_of_an_encoder_are_those_that_are_written(tmp_path: Path) -> None:
    from pipelines.tracking.card import write_card

    encoder = an_encoder(tmp_path / "encoder")
    write_card(encoder, "a\x1b[2Jname", Record(), "unknown")
    assert {p.name for p in encoder.iterdir()} <= set(registry.FILES) and "\x1b" not in (encoder / "README.md").read_text()
