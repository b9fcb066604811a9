"""The version behind uploaded files: it comes last, once, and what a failure leaves half-made is taken away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pipelines.tracking import server
from pipelines.tracking.client import EXISTS, unless


def made(
    client: Any, name: str, source: str, run_id: str, tags: dict[str, str], description: str | None, model_id: str | None = None
) -> int:
    """Make the version of model `name` whose files lie at `source`, those of the logged model `model_id`, and the model, if there
    is none. Returns the version's number.

    The answer to a request may be lost: MLflow then asks once more, and the registry has two versions, or it raises, and the registry has
    one. So the registry is asked for what it has. A model that would stay without a version is deleted.
    """
    new = unless(EXISTS, client.create_registered_model, name) is not None
    try:
        number = int(
            client.create_model_version(name, source, run_id=run_id, tags=tags, description=description, model_id=model_id).version
        )
    except Exception:
        found = _of_model(client, name)
        if found is None:
            raise
        there = sorted(int(version.version) for version in found if version.source == source)
        if not there:
            if new and not found:
                with contextlib.suppress(Exception):  # the first failure is the one to tell
                    client.delete_registered_model(name)
            raise
        number = there[0]
    for version in _of_model(client, name) or []:
        if version.source == source and int(version.version) != number:
            client.delete_model_version(name, version.version)
    return number


def _of_model(client: Any, name: str) -> list[Any] | None:
    """The versions of model `name`, None where the registry does not say."""
    with contextlib.suppress(Exception):
        return list(client.search_model_versions(f"name='{name}'"))
    return None


@contextlib.contextmanager
def removed_on_failure(client: Any, uri: str, place: str, model_id: str | None) -> Iterator[None]:
    """Remove the files at `place`, of MLflow at `uri`, and the logged model that has them, if what is done inside fails: no version will
    name them."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # a server that is away, a role that may not delete: the first failure is the one to tell
            server.remove(uri, place)
        if model_id is not None:
            with contextlib.suppress(Exception):
                client.delete_logged_model(model_id)
        raise
