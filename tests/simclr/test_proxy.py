"""Proxies of a cluster's environment: this machine's own servers are reached without one, and errors name the variable."""

from __future__ import annotations

import os

import pytest

from pipelines.tracking import uri
from simclr import proxy
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address, Unreachable
from simclr.errors import UserError
from tests.support.mlflow_server import Server
from tests.support.s3 import Proxy

CLOSED = "http://127.0.0.1:9"
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        for spelt in (name, name.upper()):
            monkeypatch.setenv(spelt, "")  # so that it is undone after the test, whatever sets it
            monkeypatch.delenv(spelt)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_servers_of_this_machine_are_reached_past_a_proxy(name: str, s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, CLOSED)
    assert Store(attempts=1).listing(Address("photos", "none")) == []
    server = Server()
    try:
        for host in ("127.0.0.1", "localhost"):
            for spelt in ("no_proxy", "NO_PROXY"):
                monkeypatch.delenv(spelt, raising=False)
            uri.check(f"http://{host}:{server.server_port}")
    finally:
        server.stop()


def test_a_proxy_that_does_not_lead_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "SOMETHING")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://minio.internal:9000")
    monkeypatch.setenv("HTTP_PROXY", CLOSED)
    words = r"through the proxy that \$HTTP_PROXY names \(if {} is to be reached without it, add that to \$no_proxy\)"
    with pytest.raises(Unreachable, match=f"the last time with a connection that failed {words.format('minio.internal')}; check"):
        Store(attempts=1).listing(Address("photos"))
    with pytest.raises(
        UserError, match=rf"no MLflow server at http://mlflow\.internal:5000 \(nothing listens there {words.format('mlflow.internal')}\)"
    ):
        uri.check("http://mlflow.internal:5000")
    monkeypatch.setenv("no_proxy", "minio.internal,.corp")
    assert proxy.hint("http://minio.internal:9000") == proxy.hint("http://a.corp/x") == proxy.hint("https://elsewhere") == ""
    assert "$HTTP_PROXY" in proxy.hint("http://user:secret@elsewhere:5000") and "secret" not in proxy.hint("http://user:secret@elsewhere")


def test_what_the_user_spares_stays_and_nothing_changes_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    proxy.spare_this_machine()
    assert dict(os.environ) == before
    monkeypatch.setenv("https_proxy", CLOSED)
    monkeypatch.setenv("NO_PROXY", "*")
    proxy.spare_this_machine()
    assert os.environ["NO_PROXY"] == "*" and "no_proxy" not in os.environ
    monkeypatch.setenv("NO_PROXY", ".corp, localhost")
    for _ in range(2):
        proxy.spare_this_machine()
        found = os.environ["no_proxy"].split(",")
        assert (
            found[:2] == [".corp", "localhost"] and {"127.0.0.1", "::1", "169.254.169.254"} < set(found) and len(set(found)) == len(found)
        )
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"]
