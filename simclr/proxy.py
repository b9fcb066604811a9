"""HTTP proxies of the environment: none is asked for this machine itself, and an error that may be a proxy's names its variable."""

from __future__ import annotations

import os
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

# This machine by its names, and where a cloud's machine asks for its role: no proxy reaches either.
_DIRECT = ("localhost", "127.0.0.1", "::1", "[::1]", "169.254.169.254", "169.254.170.2", "metadata.google.internal")


def spare_this_machine() -> None:
    """Let this process and its children reach this machine's own servers without a proxy, as an S3 or MLflow on it. Nothing changes where
    the environment names no proxy."""
    found = getproxies_environment()
    spared = found.pop("no", "")
    if not found or spared.strip() == "*":
        return
    names = [name.strip() for name in spared.split(",") if name.strip()]
    if missing := [name for name in _DIRECT if name not in names]:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*names, *missing])


def hint(url: str) -> str:
    """Which proxy requests to `url` go through, as words behind an error, and what to do; "" where they go through none."""
    parts, found = urlsplit(url), getproxies_environment()
    scheme = next((name for name in (parts.scheme, "all") if found.get(name)), "")
    if not scheme or not parts.hostname or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    variable = next(name for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper()) if os.environ.get(name))
    return f" through the proxy that ${variable} names (if {parts.hostname} is to be reached without it, add that to $no_proxy)"
