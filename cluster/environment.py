"""Keeps a node's environment in S3, and fetches it there: a node that comes later unpacks it, and installs and compiles nothing.

    python cluster/environment.py fetch s3://BUCKET/environments KEY FOLDER    into FOLDER; exit status 3: there is none yet
    python cluster/environment.py keep s3://BUCKET/environments KEY FOLDER     once: whoever is first is right

bootstrap.sh calls it, with a KEY that says what FOLDER is made of, its path and the machine's system: FOLDER names its own path in many
files. It needs boto3, tar and zstd, and knows nothing of simclr. The archive lies under its own hash, and KEY.json, which names it, is
written last and never over another one: so there is no half of an environment.

Who may write there decides what runs on every node that fetches. aws-account.yaml lets the head alone write, and a bucket of another
account is not asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import boto3.exceptions
import botocore.exceptions

NONE_YET = 3
TROUBLE = (boto3.exceptions.Boto3Error, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)


class Shelf:
    """The environments below an address of S3."""

    def __init__(self, address: str) -> None:
        self.bucket, _, prefix = address.removeprefix("s3://").partition("/")
        self.prefix = prefix.strip("/")
        self.client: Any = boto3.client("s3")
        self.own = dict[str, str]()
        # A name of a bucket may be anybody's. A store with an endpoint of its own has no accounts of Amazon's.
        if not (os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")):
            self.own = {"ExpectedBucketOwner": boto3.client("sts").get_caller_identity()["Account"]}

    def note(self, key: str) -> dict[str, Any] | None:
        """What KEY.json says: `sha256`, `bytes`, `object`. None if it is not there."""
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}.json", **self.own)
        except self.client.exceptions.NoSuchKey:
            return None
        found: dict[str, Any] = json.load(answer["Body"])
        return found

    def fetch(self, key: str, folder: Path) -> int:
        """Exit status: 0, or NONE_YET."""
        note = self.note(key)
        if note is None:
            return NONE_YET
        began, archive, beside = time.monotonic(), folder.with_name(f"{folder.name}.tar.zst"), folder.with_name(f"{folder.name}.new")
        try:
            self.client.download_file(self.bucket, note["object"], str(archive), ExtraArgs=self.own)
            if (found := sha256(archive)) != note["sha256"]:
                raise ValueError(f"s3://{self.bucket}/{note['object']} has the hash {found}, expected {note['sha256']}")
            fetched_s = time.monotonic() - began
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            unpack = ["tar", "--extract", "--use-compress-program=zstd", "--file", str(archive), "--directory", str(beside)]
            subprocess.run(unpack, check=True)
            shutil.rmtree(folder, ignore_errors=True)
            (beside / folder.name).rename(folder)
        finally:
            archive.unlink(missing_ok=True)
            shutil.rmtree(beside, ignore_errors=True)
        say(f"{folder.name} is from s3://{self.bucket}/{self.prefix}: {note['bytes'] / 1e9:.1f} GB in {fetched_s:.0f} s, ready in "
            f"{time.monotonic() - began:.0f} s")  # fmt: skip
        return 0

    def keep(self, key: str, folder: Path) -> int:
        """Exit status 0: it is there now."""
        if self.note(key) is not None:
            return 0
        began, archive = time.monotonic(), folder.with_name(f"{folder.name}.tar.zst")
        try:
            pack = ["tar", "--create", "--use-compress-program=zstd -T0", "--file", str(archive)]
            subprocess.run([*pack, "--directory", str(folder.parent), folder.name], check=True)
            digest, size = sha256(archive), archive.stat().st_size
            note = {"sha256": digest, "bytes": size, "object": f"{self.prefix}/{key}/{digest}.tar.zst"}
            self.client.upload_file(str(archive), self.bucket, note["object"], ExtraArgs=self.own)
        finally:
            archive.unlink(missing_ok=True)
        try:
            body = json.dumps(note).encode()
            self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}.json", Body=body, IfNoneMatch="*", **self.own)
        except botocore.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (409, 412):  # another node was first, or is writing now
                raise
        say(f"{folder.name} is kept at s3://{self.bucket}/{self.prefix}: {size / 1e9:.1f} GB in {time.monotonic() - began:.0f} s")
        return 0


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(sentence: str) -> None:
    print(f"setup: {sentence}", file=sys.stderr, flush=True)


def main(what: str, address: str, key: str, folder: str) -> int:
    """Exit status: 0; NONE_YET; 1 with a sentence, since a node can be set up without."""
    try:
        shelf = Shelf(address)
        return shelf.fetch(key, Path(folder)) if what == "fetch" else shelf.keep(key, Path(folder))
    except (*TROUBLE, OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
        does = "is not fetched from" if what == "fetch" else "is not kept at"
        say(f"{folder} {does} {address}: {error}")
        return 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
