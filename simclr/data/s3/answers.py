"""What S3's answers mean: which failures a retry may mend, and the sentence of every other."""

from __future__ import annotations

import hashlib
import re
from typing import IO, Any

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from simclr.data.s3.uri import Address
from simclr.errors import UserError
from simclr.telemetry.progress import moved

# Error codes to retry. A status of 500 and more is retried in any case.
_PASSING = (
    *("SlowDown", "Throttling", "ThrottlingException", "RequestThrottled", "TooManyRequests", "RequestTimeout", "OperationAborted"),
    *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"),
)
WORDS: dict[type[Exception], str] = {
    boto.ReadTimeoutError: "no answer in time",
    boto.EndpointConnectionError: "no connection",
    boto.IncompleteReadError: "a body that ended early",
    boto.ResponseStreamingError: "a body that broke off",
    boto.ConnectionClosedError: "a connection that was reset",
    ResponseParserError: "an answer that cannot be read",
    boto.HTTPClientError: "a connection that failed",
    boto.ConnectionError: "a connection that failed",
    ConnectionError: "a connection that was reset",
    boto.CredentialRetrievalError: "credentials that did not come",  # many ranks ask a node's role for them at once
}
TRANSPORT = tuple(WORDS)
CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound, boto.TokenRetrievalError, boto.SSOError)
HOW_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or run where a role gives them"


class Missing(UserError):
    """There is no such object."""


class Damaged(UserError):
    """An object's bytes do not match its checksum or the manifest."""


class TooLarge(UserError):
    """An object that is to be read into memory has more bytes than any such object."""


class Retry(Exception):
    """A failure that a retry may mend."""


class Changed(Retry):
    """The object has changed since its download began."""


def reason_of(error: boto.ClientError, place: Address) -> str:
    """Status and code of an error that a retry may mend. Raises Changed, Missing or UserError for all others."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = re.sub(r"\W", "", str(error.response.get("Error", {}).get("Code", "")))[:64]
    if code in ("PreconditionFailed", "InvalidRange") or status in (412, 416):
        raise Changed("an object that changed while it was fetched") from None
    if status >= 500 or status == 429 or code in _PASSING or status < 300:  # 200 with an error in its body
        return f"{status} {code}".removesuffix(f" {status}")
    if code == "NoSuchBucket":
        raise Missing(f"there is no bucket {place.bucket} for {place}; make it, or correct the address") from None
    if status == 404:
        raise Missing(f"there is no {place}; correct the address") from None
    if status in (401, 403) or "Token" in code:
        what = f"{status} {code}".removesuffix(f" {status}")
        raise UserError(f"S3 refuses {place} to these credentials ({what}); get permission for it, or {HOW_CREDENTIALS}") from None
    raise UserError(f"S3 refuses the request for {place} ({status} {code}); check the address, the region and the endpoint") from None


def md5_in(answer: dict[str, Any]) -> str:
    """The MD5 of an object or a part, in hex; "" if its ETag is none, as for several parts or encryption under another key."""
    etag = str(answer.get("ETag", "")).strip('"')
    plain = answer.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in answer
    return etag if plain and re.fullmatch(r"[0-9a-f]{32}", etag) else ""


def md5_of(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def sha256_of(file: IO[bytes]) -> str:
    """The sha256 of an open file, in hex, from where it stands. Each piece that was read is progress."""
    hashed = hashlib.sha256()
    while part := file.read(1 << 20):
        hashed.update(part)
        moved()
    return hashed.hexdigest()
