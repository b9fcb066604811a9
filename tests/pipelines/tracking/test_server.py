"""Asking a server as MLflow does: certificates, logins, names of hosts, plugins, slow lines. And the canary of MLflow's private names."""

from __future__ import annotations

import datetime
import importlib
import inspect
import ipaddress
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.tracking import server as asking
from pipelines.tracking import uri as mlflow_uri
from pipelines.tracking.client import connect
from simclr.errors import UserError
from tests.pipelines.tracking.conftest import Database
from tests.support.ears import Ears
from tests.support.mlflow_server import Answer, Server


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


# ── Certificates and logins ──────────────────────────────────────────────────────────────────────────────────────────


def certificate(path: Path, name: str) -> Path:
    """A key and a certificate for 127.0.0.1 that signs itself, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, who = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(who).issuer_name(who).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(text + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


def test_certificates_are_those_that_mlflow_shows_and_takes(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = certificate(tmp_path / "server.pem", "server"), certificate(tmp_path / "client.pem", "client")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(theirs)
    context.load_verify_locations(ours)
    context.verify_mode = ssl.CERT_REQUIRED
    server.socket = context.wrap_socket(server.socket, server_side=True)
    uri = f"https://127.0.0.1:{server.server_port}"
    with pytest.raises(UserError, match=r"no MLflow server at https://.* \(SSLCertVerificationError: self-signed certificate\); start it"):
        mlflow_uri.check(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(theirs))
    with pytest.raises(UserError, match=r"no MLflow server at https://"):  # it asks for the client's
        mlflow_uri.check(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", str(ours))
    mlflow_uri.check(uri)
    connect(uri).get_experiment("1")  # the work itself
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    with pytest.warns(Warning, match="Unverified HTTPS"):
        mlflow_uri.check(uri)


def test_the_file_of_credentials_is_read_as_mlflow_reads_it(home: Path) -> None:
    (home / ".mlflow").mkdir()
    (home / ".mlflow" / "credentials").write_text("[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = mine\n")
    ears = Ears()
    mlflow_uri.check(ears.uri)
    ears.stop()
    assert ears.told == ["Basic bWU6bWluZQ=="]


def test_a_server_that_is_busy_for_a_moment_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = [503, 200]
    answer = Answer.do_GET
    monkeypatch.setattr(Answer, "do_GET", lambda self: self.send_error(503) if statuses.pop(0) == 503 else answer(self))
    mlflow_uri.check(server.uri)
    assert not statuses


# ── Names of hosts, addresses of plugins ─────────────────────────────────────────────────────────────────────────────


def test_a_name_that_the_server_refuses_is_no_matter_of_credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.server.security_utils import INVALID_HOST_MSG

    def refuses(self: Answer) -> None:
        self.send_response(403)
        self.send_header("Content-Length", str(len(INVALID_HOST_MSG)))
        self.end_headers()
        self.wfile.write(INVALID_HOST_MSG.encode())

    monkeypatch.setattr(Answer, "do_GET", refuses)
    host = f"127.0.0.1:{server.server_port}"
    with pytest.raises(UserError, match=rf"it refuses requests under the name {host} .* starts it with --allowed-hosts '{host},") as error:
        mlflow_uri.check(server.uri)
    assert "secret" not in str(error.value) and "credentials" not in str(error.value)


def test_what_mlflow_knows_is_an_address(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking._tracking_service.utils import _register, _tracking_store_registry

    for uri in ("databricks", "databricks://profile", "databricks-uc", "postgresql://me@host/mlflow", "file:///srv/mlruns"):
        assert asking.known(uri), uri
    arn = "arn:aws:sagemaker:us-east-1:1:mlflow-tracking-server/team"
    with pytest.raises(UserError, match=r"arn:aws:.* is no MLflow address; .* with sagemaker-mlflow installed"):
        mlflow_uri.check(arn)
    # What the plugin does: it registers a builder for its scheme.
    sqlite, build = database("plugin"), _tracking_store_registry.get_store_builder("sqlite:///x")
    _register("arn", lambda store_uri, artifact_uri: build(sqlite, artifact_uri))
    try:
        assert asking.known(arn)
        mlflow_uri.check(arn)
    finally:
        del _tracking_store_registry._registry["arn"]
    with pytest.raises(UserError, match="MLflow at databricks-uc cannot be used: Detected Unity Catalog tracking URI"):
        mlflow_uri.check("databricks-uc")


# ── Slow lines ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_upload_has_time_by_its_size(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers 1.5 s after it has all, and 1 s is the time for any answer."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    def slowly(self: Answer) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(1.5)
        self.reply({})

    monkeypatch.setattr(Answer, "do_PUT", slowly, raising=False)
    monkeypatch.setattr(asking, "_TIMEOUT_S", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "weights").write_bytes(bytes(asking.SLOWEST))
    place = f"{server.uri}/api/2.0/mlflow-artifacts/artifacts/x"
    with pytest.raises(MlflowException, match=r"timed out|timeout"):
        get_artifact_repository(place).log_artifact(str(tmp_path / "weights"))
    with asking.patience(asking.SLOWEST, place):
        get_artifact_repository(place).log_artifact(str(tmp_path / "weights"))
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


def test_time_that_the_user_sets_stays_and_s3_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    with asking.patience(100_000_000, "s3://bucket/mlflow"):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
        from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-7")  # a client of its own: MLflow keeps them
        assert S3ArtifactRepository("s3://bucket/mlflow")._get_s3_client().meta.config.read_timeout == 430
    assert boto3.client("s3", region_name="eu-west-1").meta.config.read_timeout == 60


# ── The canary ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [
        (
            "mlflow.utils.rest_utils",
            "http_request",
            "host_creds endpoint method max_retries backoff_factor backoff_jitter raise_on_status respect_retry_after_header timeout",
        ),
        ("mlflow.utils.credentials", "get_default_host_creds", "store_uri"),
        ("mlflow.tracking._tracking_service.utils", "_tracking_store_registry.get_store_builder", "store_uri"),
        ("mlflow.store.artifact.artifact_repository_registry", "get_artifact_repository", "artifact_uri tracking_uri"),
        ("mlflow.store.artifact.artifact_repo", "ArtifactRepository.delete_artifacts", "artifact_path"),
    ],
)
def test_mlflow_has_the_names_that_the_door_uses(module: str, name: str, parameters: str) -> None:
    found: object = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    assert callable(found), f"{module} has no {name}: mend pipelines/tracking/server.py"
    lacking = set(parameters.split()) - set(inspect.signature(found).parameters)
    assert not lacking, f"{module}.{name} takes no {lacking}: mend pipelines/tracking/server.py"
