"""gcp-project.sh and the bucket of bootstrap.sh, with commands of the same names that record in place of Google's: who gets which right.

Google itself is not asked: that its conditions hold as they are read here is what cluster/README.md says of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

PROJECT, NUMBER, FOREIGN = "my-project", "111", "999"
GCLOUD = """#!/bin/sh
printf '%s\\t' "$@" >>"$CALLS"; echo >>"$CALLS"
case "$*" in
    "projects describe "*) echo 111 ;;
    "storage buckets describe "*--raw*) echo "$OWNER" ;;
    *" describe "*) [ "$THERE" = yes ] ;;
esac
"""


def command(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


# ── gcp-project.sh ─────────────────────────────────────────────────────────────────────────────────────────────────


def project(folder: Path, owner: str = NUMBER, there: str = "no") -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """(the script's end, the words of each call of gcloud)."""
    command(folder / "bin", "gcloud", GCLOUD)
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    env = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "OWNER": owner, "THERE": there}
    script = ["sh", str(ROOT / "cluster/gcp-project.sh"), PROJECT, "203.0.113.7/32"]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=30)
    return done, [line.rstrip("\t").split("\t") for line in calls.read_text().splitlines()]


@dataclass(frozen=True)
class Grant:
    on: str
    who: str
    role: str
    condition: str
    """CEL; "" for none."""


def grants(calls: list[list[str]], verb: str = "add-iam-policy-binding") -> list[Grant]:
    found = []
    for words in calls:
        if verb in words:
            flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
            condition = flags.get("condition", "None")
            expression = "" if condition == "None" else re.sub(r"^expression=|,title=[a-z-]+$", "", condition)
            on = " ".join(w for w in words[: words.index(verb)]) + " " + words[words.index(verb) + 1]
            found.append(Grant(on, flags["member"].removeprefix("serviceAccount:").split("@")[0], flags["role"], expression))
    return found


class Name(str):
    """CEL's functions of a text."""

    def startsWith(self, prefix: str) -> bool:
        return self.startswith(prefix)

    def extract(self, template: str) -> Name:
        return Name(self.partition(template.removesuffix("{name}"))[2])


def holds(condition: str, kind: str, name: str) -> bool:
    """The condition's value for a resource, as CEL gives it for the few functions used here."""
    words: Any = type("resource", (), {"type": kind, "name": Name(name)})
    return not condition or bool(eval(condition.replace("&&", " and ").replace("||", " or "), {"resource": words}))


def writes(granted: list[Grant], who: str, path: str) -> bool:
    name = f"projects/_/buckets/simclr-{PROJECT}/objects/{path}"
    return any(
        g.role == "roles/storage.objectUser" and holds(g.condition, "storage.googleapis.com/Object", name) for g in granted if g.who == who
    )


def test_workers_write_runs_and_the_head_mlflow_too_and_nobody_shards(tmp_path: Path) -> None:
    done, calls = project(tmp_path)
    assert done.returncode == 0, done.stderr
    on_bucket = [g for g in grants(calls) if g.on == f"storage buckets gs://simclr-{PROJECT}"]
    assert {(g.who, g.role) for g in on_bucket if not g.condition} == {
        (who, role)
        for who in ("simclr-worker", "simclr-head")
        for role in ("roles/storage.objectViewer", "roles/storage.legacyBucketReader")
    }
    for who, path, may in [
        ("simclr-worker", "runs/r50/step_1/model.safetensors", True),
        ("simclr-worker", "runs/", True),
        ("simclr-worker", "runs-of-others/x", False),
        ("simclr-worker", "mlflow/1/model", False),
        ("simclr-worker", "imagenet/train-00000.beton", False),
        ("simclr-head", "runs/r50/run.json", True),
        ("simclr-head", "mlflow/1/model", True),
        ("simclr-head", "imagenet/train-00000.beton", False),
    ]:
        assert writes(on_bucket, who, path) is may, (who, path)


def test_the_head_makes_and_removes_rays_nodes_and_no_other_machine(tmp_path: Path) -> None:
    _, calls = project(tmp_path)
    granted = [g for g in grants(calls) if g.on == f"projects {PROJECT}"]
    assert {g.who for g in granted} == {"simclr-head"}
    assert {g.role for g in granted} == {f"projects/{PROJECT}/roles/{name}" for name in ("simclrNodes", "simclrLook", "simclrTpus")}
    role = {words[3]: _flag(words, "permissions").split(",") for words in calls if words[:3] == ["iam", "roles", "create"]}
    assert all(not re.search(r"\*|[sS]etMetadata|[iI]amPolicy|[uU]pdateAccess|setServiceAccountKey", p) for ps in role.values() for p in ps)
    unconditioned = {p for g in granted if not g.condition for p in role[g.role.split("/")[-1]]}
    # What Google cannot narrow by name: lists, operations, TPUs.
    assert all(p in ("compute.instances.list", "compute.zoneOperations.get") or p.startswith("tpu.") for p in unconditioned)
    (nodes,) = (g for g in granted if g.condition)
    assert {"compute.instances.create", "compute.instances.delete", "compute.disks.create"} <= set(role["simclrNodes"])
    instance, disk = "compute.googleapis.com/Instance", "compute.googleapis.com/Disk"
    for kind, name, may in [
        (instance, "instances/ray-simclr-worker-abcdef12-compute", True),
        (instance, "instances/ray-simclr-tpu-head-abcdef12-compute", True),
        (disk, "disks/ray-simclr-worker-abcdef12-compute", True),
        (instance, "instances/database", False),
        (instance, "instances/not-ray-simclr-worker", False),
        (disk, "disks/database", False),
        ("compute.googleapis.com/Snapshot", "snapshots/ray-simclr-x", False),
    ]:
        assert holds(nodes.condition, kind, f"projects/{PROJECT}/zones/us-central1-a/{name}") is may, name
    others = {g.on: g.role for g in grants(calls) if not g.on.startswith(("projects", "storage"))}
    assert others == {
        "compute networks subnets simclr": "roles/compute.networkUser",
        f"iam service-accounts simclr-worker@{PROJECT}.iam.gserviceaccount.com": "roles/iam.serviceAccountUser",
    }


def test_the_names_are_those_that_ray_gives() -> None:
    """The condition's prefix against Ray's own way to name a node: nobody here makes one at Google's."""
    (ray,) = importlib.util.find_spec("ray").submodule_search_locations  # type: ignore[union-attr]
    autoscaler = Path(ray) / "autoscaler"
    assert 'f"{name_label}-{uuid4().hex[:INSTANCE_NAME_UUID_LEN]}-{node_suffix}"' in (autoscaler / "_private/gcp/node.py").read_text()
    launchers = ("_private/commands.py", "_private/node_launcher.py", "v2/instance_manager/node_provider.py")
    labels = {
        label for path in launchers for label in re.findall(r'TAG_RAY_NODE_NAME\]?(?::| =) "(.*)"\.format', (autoscaler / path).read_text())
    }
    assert labels == {"ray-{}-head", "ray-{}-worker"}
    for name in ("gcp-gpu.yaml", "gcp-tpu-pod.yaml"):
        cluster = yaml.safe_load((ROOT / "cluster" / name).read_text())["cluster_name"]
        assert all(label.format(cluster).startswith("ray-simclr-") for label in labels)


def test_what_earlier_versions_granted_is_taken_away(tmp_path: Path) -> None:
    _, calls = project(tmp_path, there="yes")
    taken = {(g.on, g.who, g.role) for g in grants(calls, "remove-iam-policy-binding")}
    wide = ("roles/compute.instanceAdmin.v1", "roles/compute.networkUser", "roles/tpu.admin")
    assert taken == {(f"projects {PROJECT}", "simclr-head", role) for role in wide} | {
        (f"storage buckets gs://simclr-{PROJECT}", who, "roles/storage.objectUser") for who in ("simclr-worker", "simclr-head")
    }
    assert not {(g.on, g.who, g.role) for g in grants(calls) if not g.condition} & taken
    assert ["iam", "roles", "update", "simclrNodes"] in [words[:4] for words in calls]  # a second run mends the roles


@pytest.mark.parametrize("owner", [FOREIGN, ""])
def test_somebody_elses_bucket_is_refused_before_anybody_gets_a_right(owner: str, tmp_path: Path) -> None:
    done, calls = project(tmp_path, owner, there="yes")
    assert done.returncode == 1
    assert f"gs://simclr-{PROJECT} is of project {owner or 'unknown'}, expected {PROJECT}'s own number {NUMBER}" in done.stderr
    assert not grants(calls)


def _flag(words: list[str], name: str) -> str:
    (found,) = (word.split("=", 1)[1] for word in words if word.startswith(f"--{name}="))
    return found


# ── bootstrap.sh node gcs ──────────────────────────────────────────────────────────────────────────────────────────

CURL = """#!/bin/sh
printf '%s ' "$@" >>"$CALLS"; echo >>"$CALLS"
to=/dev/stdout before=""
for url; do [ "$before" != -o ] || to=$url; before=$url; done
case "$*" in
    *https://packages.cloud.google.com/apt/doc/apt-key.gpg*) printf -- "$KEY" >"$to"; exit 0 ;;
esac
case "$url" in
    *metadata*/project/project-id) printf my-project ;;
    *metadata*/project/numeric-project-id) printf 111 ;;
    *metadata*/token) printf '{"access_token":"ya29.x","expires_in":3599,"token_type":"Bearer"}' ;;
    https://storage.googleapis.com/storage/v1/b/simclr-my-project*)
        [ "$(cat)" = "Authorization: Bearer ya29.x" ] && [ -n "$OWNER" ] || exit 22
        printf '{\\n  "projectNumber": "%s"\\n}\\n' "$OWNER" ;;
    *) exit 22 ;;
esac
"""
RECORDS = '#!/bin/sh\necho "$(basename "$0") $*" >>"$CALLS"\n'
# Keeps what the script would write as root.
SUDO = (
    RECORDS
    + """case "$*" in "install "*) cp "$4" "$CALLS.$(basename "$5")" ;; "env "*) shift; exec env "$@" ;; esac
"""
)
APT = (
    RECORDS
    + """[ "$(cat "$CALLS.simclr-gcsfuse.list" 2>/dev/null)" ] || exit 0
case "$*" in
    *update*) touch "$CALLS.updated" ;;
    *gcsfuse*)
        [ -e "$CALLS.updated" ] || { echo "E: Unable to locate package gcsfuse"; exit 100; }
        cp "$(dirname "$0")/records" "$(dirname "$0")/gcsfuse" ;;
esac
"""
)
KEY = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n"


def node(folder: Path, owner: str, gcsfuse: bool = True, key: str = KEY) -> tuple[subprocess.CompletedProcess[str], str]:
    """(the end of `bootstrap.sh node gcs` where the packages are installed already, but for gcsfuse unless so; what it called)."""
    made_of = ("requirements.lock", "cluster/build.lock", "pyproject.toml", "cluster/bootstrap.sh")
    (folder / "simclr/cluster").mkdir(parents=True)
    for name in made_of:
        shutil.copy(ROOT / name, folder / "simclr" / name)
    command(folder / "simclr/.venv", "unused", "")
    command(folder / "simclr/.venv/bin", "simclr", "#!/bin/sh\n")
    digest = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in made_of)).hexdigest()
    (folder / "simclr/.venv/installed").write_text(f"{digest} {folder / 'simclr'}\n")
    fakes = folder / "bin"
    command(fakes, "curl", CURL)
    command(fakes, "id", "#!/bin/sh\necho 1000\n")
    command(fakes, "mountpoint", "#!/bin/sh\nexit 1\n")
    for name in ("c++", "pkg-config", "python3.11", "rsync"):  # what the script looks for is there
        command(fakes, name, "#!/bin/sh\n")
    for name, text in {"sudo": SUDO, "apt-get": APT, "gcsfuse" if gcsfuse else "records": RECORDS}.items():
        command(fakes, name, text)
    env = {"PATH": f"{fakes}:{os.environ['PATH']}", "HOME": str(folder), "CALLS": str(folder / "calls"), "OWNER": owner, "KEY": key}
    script = ["sh", str(folder / "simclr/cluster/bootstrap.sh"), "node", "gcs"]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=60)
    return done, (folder / "calls").read_text()


def test_a_node_mounts_its_own_projects_bucket(tmp_path: Path) -> None:
    done, calls = node(tmp_path, NUMBER)
    assert done.returncode == 0, done.stderr
    assert "gcsfuse --implicit-dirs simclr-my-project /mnt/simclr\n" in calls
    assert "ya29" not in calls  # a command's words can be read by every user of the machine


@pytest.mark.parametrize("owner", [FOREIGN, ""])
def test_a_node_does_not_mount_somebody_elses(owner: str, tmp_path: Path) -> None:
    done, calls = node(tmp_path, owner)
    assert done.returncode == 1
    assert f"gs://simclr-my-project is of project {owner or 'unknown'}" in done.stderr and "nothing is mounted" in done.stderr
    assert "gcsfuse" not in calls


def test_a_stock_ubuntu_gets_gcsfuse_from_googles_repository(tmp_path: Path) -> None:
    """The key signs this repository alone. Google's servers are not asked: this machine has no way to them."""
    done, calls = node(tmp_path, NUMBER, gcsfuse=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls.simclr-google.asc").read_text() == "-----BEGIN PGP PUBLIC KEY BLOCK-----\n"
    release = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    assert release is not None
    (line,) = (tmp_path / "calls.simclr-gcsfuse.list").read_text().splitlines()
    keyring = "/usr/share/keyrings/simclr-google.asc"
    assert line == f"deb [signed-by={keyring}] https://packages.cloud.google.com/apt gcsfuse-{release[1]} main"
    # As on a machine whose index does not have the new repository yet: installed at the second try.
    assert re.findall(r"^apt-get (update|install)", calls, re.MULTILINE) == ["install", "update", "install"]
    assert calls.endswith("gcsfuse --implicit-dirs simclr-my-project /mnt/simclr\n")


def test_an_answer_that_is_no_key_is_not_trusted(tmp_path: Path) -> None:
    done, calls = node(tmp_path, NUMBER, gcsfuse=False, key="<html>captive portal</html>")
    assert done.returncode == 1 and "the key of Google's packages cannot be fetched" in done.stderr
    assert "apt-get" not in calls and "gcsfuse --" not in calls
