#!/bin/sh
# Installs what SimCLR needs on a Debian or Ubuntu machine: system packages, .venv, the locked Python packages (hashes checked).
# Run it from anywhere, as often as you like: what is there already costs a second. `make demo` and `make test` begin with it.
#
#   bootstrap.sh             a checkout: what runs, and the tools of the tests
#   bootstrap.sh node        a cluster's node: what runs, and the cache of shards on the node's fast local disks, where it has any
#   bootstrap.sh node gcs    the same, and the project's bucket at /mnt/simclr (Google Cloud)
#   bootstrap.sh node s3://BUCKET/environments    the same as node; .venv comes from there, if another node has kept it
#   bootstrap.sh keep s3://BUCKET/environments    keeps this node's .venv there, unless it is there
#   bootstrap.sh packages NAME …    system packages alone
set -eu
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }
node=${1:-} bucket=${2:-}
case "$node $bucket" in
    " " | "node " | "node gcs" | "node s3://"?*/?* | "keep s3://"?*/?* | "packages "[a-z]*) ;;
    *) say "expected no argument, node, node gcs, node or keep s3://BUCKET/environments, or packages NAME …; got: $*"; exit 2 ;;
esac
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# A fresh machine updates itself for minutes (unattended-upgrades) and holds apt's locks meanwhile. There are four: for two of them
# DPkg::Lock::Timeout waits (apt 2.6), for those of the index and of the downloads nothing does. So this asks again until all are free.
apt() {
    began=$(date +%s) held=""
    until as_root env DEBIAN_FRONTEND=noninteractive LC_ALL=C apt-get "$@" >"$log" 2>&1; do
        lock=$(sed -n 's/^E: Could not get lock //p' "$log" | head -n 1)
        [ -n "$lock" ] || return 1
        [ $(($(date +%s) - began)) -lt 900 ] || { say "another program has held apt's lock for 15 minutes: $lock"; return 1; }
        [ "$held" = "${lock%%. *}" ] || say "waiting for another program that installs packages, 15 minutes at most: $lock"
        held=${lock%%. *}
        sleep 1
    done
}
# The index may be old or absent (fresh containers): then it is fetched, and the installation tried once more.
install_packages() {
    install="install -y --no-install-recommends $*"
    if ! command -v apt-get >/dev/null; then
        say "these packages (their Debian names) are missing, and there is no apt-get here: $*; install them and run the same command again"
        exit 1
    elif [ "$(id -u)" != 0 ] && ! { command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; }; then
        say "system packages are missing and this user cannot install them; ask an administrator to run:  sudo apt-get $install"
        exit 1
    fi
    say "installing $*"
    # shellcheck disable=SC2086
    apt $install || { apt update && apt $install; } || {
        tail -n 20 "$log" >&2
        say "apt could not install them; mend that and run the same command again:  sudo apt-get $install"
        exit 1
    }
}
if [ "$node" = packages ]; then
    shift
    install_packages "$@"
    exit 0
fi

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
[ -z "$node" ] || command -v rsync >/dev/null || missing="$missing rsync"
[ "${bucket#s3://}" = "$bucket" ] || command -v zstd >/dev/null || missing="$missing zstd"
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086
    install_packages $missing
    python=$(find_python || true)
    [ -n "$python" ] || { say "no Python 3.11 or 3.12 was found; install one and run the same command again"; exit 1; }
fi

# ── A node's cache of shards, on its local disks ───────────────────────────────────────────────────────────────────
if [ -n "$node" ]; then
    fast=""
    if mountpoint -q /opt/dlami/nvme; then
        fast=/opt/dlami/nvme                      # Amazon's image has made one volume of them all
    elif mountpoint -q /mnt/fast; then
        fast=/mnt/fast
    else
        # Google's local SSDs. No other disk is ever formatted: an empty-looking one may be somebody's.
        disks=$(find /dev/disk/by-id -name 'google-local-nvme-ssd-*' ! -name '*-part*' 2>/dev/null | sort)
        if [ -n "$disks" ]; then
            device=$disks
            # shellcheck disable=SC2086
            set -- $disks
            if [ $# -gt 1 ]; then
                device=/dev/md/fast
                command -v mdadm >/dev/null || install_packages mdadm
                [ -e $device ] || as_root mdadm --create $device --run --level=0 --raid-devices=$# "$@"
            fi
            as_root blkid "$device" >/dev/null || as_root mkfs.ext4 -q -m 0 "$device"
            as_root mkdir -p /mnt/fast
            as_root mount "$device" /mnt/fast
            fast=/mnt/fast
        fi
    fi
    if [ -n "$fast" ] && [ ! -e ~/.cache/simclr ]; then
        as_root mkdir -p $fast/simclr
        as_root chown "$(id -u)" $fast/simclr
        mkdir -p ~/.cache
        ln -sfn $fast/simclr ~/.cache/simclr      # where simclr keeps its copies, unless SIMCLR_CACHE says otherwise
        say "shards are cached on $fast"
    fi
fi
# Ray itself says only `ray stop` over ssh (`ray down`), and a shell there (`ray attach`) wants both commands too.
if [ -n "$node" ] && ! grep -qs "$PWD/.venv/bin" ~/.bashrc; then
    echo "export PATH=\"$PWD/.venv/bin:\$PATH\"" >>~/.bashrc
fi
if [ "$bucket" = gcs ] && ! mountpoint -q /mnt/simclr; then
    ask() { curl -sf -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/$1"; }
    project=$(ask project/project-id) && number=$(ask project/numeric-project-id) ||
        { say "the metadata service of Google Cloud does not answer; expected a machine there: leave gcs out elsewhere"; exit 1; }
    name=simclr-$project
    # Anybody may have made a bucket of this name before us: then shards would be theirs, and they would get our runs.
    # The token goes by standard input, since a command's words can be read by every user.
    owner=$(ask instance/service-accounts/default/token | sed -n 's/.*"access_token" *: *"\([^"]*\)".*/Authorization: Bearer \1/p' |
        curl -sf -H @- "https://storage.googleapis.com/storage/v1/b/$name?fields=projectNumber" | tr -dc 0-9 || true)
    if [ "$owner" != "$number" ]; then
        say "bucket gs://$name is of project ${owner:-unknown (this node may not read it)}, expected $project's own number $number; nothing is mounted: run cluster/gcp-project.sh, and see whose the bucket is"
        exit 1
    fi
    if ! command -v gcsfuse >/dev/null; then
        # Ubuntu has no such package; it is in Google's repository, whose key comes from Google by TLS and signs nothing else here. The key
        # is not pinned: Google has replaced it several times, and every node would then fail.
        google=https://packages.cloud.google.com/apt keyring=/usr/share/keyrings/simclr-google.asc
        curl -sfL --proto '=https' --retry 5 "$google/doc/apt-key.gpg" -o "$log" && grep -q 'BEGIN PGP PUBLIC KEY' "$log" ||
            { say "gcsfuse is not installed, and the key of Google's packages cannot be fetched from $google/doc/apt-key.gpg; let this node reach it, or use an image that has gcsfuse"; exit 1; }
        as_root install -m 644 "$log" $keyring
        release=$(. /etc/os-release && echo "$VERSION_CODENAME")
        echo "deb [signed-by=$keyring] $google gcsfuse-$release main" >"$log"
        as_root install -m 644 "$log" /etc/apt/sources.list.d/simclr-gcsfuse.list
        # An address without such packages would fail every later index.
        (install_packages gcsfuse) || { as_root rm -f /etc/apt/sources.list.d/simclr-gcsfuse.list; exit 1; }
    fi
    as_root mkdir -p /mnt/simclr
    as_root chown "$(id -u)" /mnt/simclr
    # Training reads shards here and there, in memory maps: each is fetched once, whole, where there is a fast disk to keep it.
    set -- --implicit-dirs
    if [ -n "$fast" ]; then
        as_root mkdir -p "$fast/gcsfuse"
        as_root chown "$(id -u)" "$fast/gcsfuse"
        set -- "$@" "--cache-dir=$fast/gcsfuse" --file-cache-max-size-mb=-1 --file-cache-cache-file-for-range-read
    fi
    gcsfuse "$@" "$name" /mnt/simclr
fi

# ── Python packages, as the lock says: what runs, and in a checkout the tools of the tests ─────────────────────────
lock=requirements-dev.lock
[ -z "$node" ] || lock=requirements.lock
wanted=$(cat $lock cluster/build.lock pyproject.toml cluster/bootstrap.sh | sha256sum | cut -d ' ' -f 1)
have=$(cat .venv/installed 2>/dev/null || true)
# Of what a kept environment is made besides: its scripts name this folder and this Python, FFCV is compiled against these libraries.
key=$({ echo "$wanted $PWD $(uname -m)"; cat /etc/os-release; command -v "$python"; "$python" -VV; pkg-config --modversion opencv4 libturbojpeg; } | sha256sum | cut -d ' ' -f 1)
if [ -x .venv/bin/simclr ] && [ "$have" = "$wanted $PWD" ]; then
    # What cannot be kept is installed all the same.
    [ "$node" != keep ] || .venv/bin/python cluster/environment.py keep "$bucket" "$key" .venv || true
    exit 0
fi
# On a shared disk, made for another checkout: as good, since a job brings its code.
if [ -L .venv ]; then
    [ "${have%% *}" = "$wanted" ] && exit 0
    say "$(readlink -f .venv) is of another lock than $PWD/$lock; run cluster/bootstrap.sh${node:+ node} where it was made"
    exit 1
fi
if [ "$node" = keep ]; then
    say "there is no environment of $PWD/$lock to keep; run bootstrap.sh node first"
    exit 1
fi
if [ "$node" = node ] && [ "${bucket#s3://}" != "$bucket" ]; then
    # boto3 alone, for as long as this takes.
    "$python" -m venv --clear .fetch
    awk '/^(boto3|botocore|jmespath|python-dateutil|s3transfer|six|urllib3)==/ { on = 1 } on { print } /^ .*[0-9a-f]$/ { on = 0 }' $lock >.fetch/boto3.lock
    .fetch/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .fetch/boto3.lock &&
        .fetch/bin/python cluster/environment.py fetch "$bucket" "$key" .venv && found=yes || found=""
    rm -rf .fetch
    [ -z "$found" ] || exit 0
fi
say "installing the locked Python packages into .venv (about 6 GB, most of it CUDA)"
# --clear: what an interrupted set-up left has no pip.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
if [ ! -x .venv/bin/uv ]; then
    awk '/^uv==/ { on = 1 } on { print } on && !/\\$/ { exit }' cluster/build.lock >.venv/uv.lock
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.lock
fi
# Its own cache may lie on another disk: copying is then what happens anyway, without a warning.
export UV_LINK_MODE="${UV_LINK_MODE:-copy}" VIRTUAL_ENV="$PWD/.venv"
# The three that have no wheels are built with the setuptools of build.lock; nothing else is built, so nothing else runs here.
# Compiled now: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every process would do it again, 3 s for torch alone.
.venv/bin/uv pip install --quiet --compile-bytecode --require-hashes --build-constraint cluster/build.lock \
    --only-binary :all: --no-binary ffcv --no-binary fastargs --no-binary assertpy -r $lock
# What a set-up before December 2026 installed under another name would own the command, too.
[ ! -d "$(echo .venv/lib/python3*/site-packages/simclr-*.dist-info)" ] || .venv/bin/uv pip uninstall --quiet simclr
.venv/bin/uv pip install --quiet --no-deps --no-build-isolation -e .
echo "$wanted $PWD" >.venv/installed
say "done"
