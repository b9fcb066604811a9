#!/bin/sh
# Installs what SimCLR needs on a Debian or Ubuntu machine: system packages, .venv, the locked Python packages.
# Run it from anywhere, as often as you like: what is there already costs a second. `make demo` and `make test` begin with it.
set -eu
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }

# ── System packages: FFCV is compiled against OpenCV and libjpeg-turbo ────────────────────────────────────────────
missing=""
command -v c++ >/dev/null || missing="$missing g++"
command -v pkg-config >/dev/null || missing="$missing pkg-config"
pkg-config --exists opencv4 2>/dev/null || missing="$missing libopencv-dev"
pkg-config --exists libturbojpeg 2>/dev/null || missing="$missing libturbojpeg0-dev"
find_python() {
    for candidate in python3.11 python3.12 python3; do
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo "$candidate" && return
    done
}
python=$(find_python || true)
[ -n "$python" ] || missing="$missing python3 python3-venv python3-dev"
if [ -n "$python" ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || missing="$missing python3-dev"
fi
if [ -n "$missing" ]; then
    install="apt-get install -y --no-install-recommends$missing"
    if ! command -v apt-get >/dev/null; then
        say "these packages (their Debian names) are missing, and there is no apt-get here:$missing; install them and run the same command again"
        exit 1
    elif [ "$(id -u)" = 0 ]; then
        as_root=""
    elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
        as_root="sudo"
    else
        say "system packages are missing and this user cannot install them; ask an administrator to run:  sudo $install"
        exit 1
    fi
    say "installing$missing"
    # The index may be old or absent (fresh containers): then it is fetched, and the installation tried once more.
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    # shellcheck disable=SC2086
    $as_root $install >"$log" 2>&1 || { $as_root apt-get update >"$log" 2>&1 && $as_root $install >>"$log" 2>&1; } || {
        tail -n 20 "$log" >&2
        say "apt could not install them; mend that and run the same command again:  sudo $install"
        exit 1
    }
    rm -f "$log"
    python=$(find_python || true)
    [ -n "$python" ] || { say "no Python 3.11 or 3.12 was found; install one and run the same command again"; exit 1; }
fi

# ── Python packages, as requirements.lock says ─────────────────────────────────────────────────────────────────────
wanted=$(cat requirements.lock pyproject.toml cluster/bootstrap.sh | sha256sum | cut -d ' ' -f 1)
if [ -x .venv/bin/simclr ] && [ "$(cat .venv/installed 2>/dev/null)" = "$wanted $PWD" ]; then
    exit 0
fi
say "installing the locked Python packages into .venv (about 6 GB, most of it CUDA)"
# --clear: what an interrupted set-up left has no pip.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
if [ ! -x .venv/bin/uv ]; then
    awk '/^uv==/ { on = 1 } on { print } on && !/\\$/ { exit }' requirements.lock >.venv/uv.lock
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.lock
fi
# Its own cache may lie on another disk: copying is then what happens anyway, without a warning.
export UV_LINK_MODE="${UV_LINK_MODE:-copy}" VIRTUAL_ENV="$PWD/.venv"
# Compiled now: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every process would do it again, 3 s for torch alone.
.venv/bin/uv pip install --quiet --compile-bytecode --require-hashes -r requirements.lock
.venv/bin/uv pip install --quiet --no-deps --no-build-isolation -e .
echo "$wanted $PWD" >.venv/installed
say "done"
