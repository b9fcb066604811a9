"""What S3's answers mean: which failures a retry may mend, and the sentence of every other."""

from __future__ import annotations

import hashlib
import os
import re
import time
from typing import IO, Any

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from simclr.data.s3.uri import Address, Unreachable
from simclr.errors import UserError
from simclr.telemetry.progress import moved
from simclr.text import printable

# Error codes to retry. A status of 500 and more is retried in any case.
_PASSING = (
    *("SlowDown", "Throttling", "ThrottlingException", "RequestThrottled", "TooManyRequests", "RequestTimeout", "OperationAborted"),
    "ConditionalRequestConflict",  # another conditional write of the same object was under way
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
_ENDED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
_OVER = "credentials that have ended"
_RENEW = "renew them where boto3 finds them (a role, a profile, `aws sso login`; those in AWS_* variables need a new start)"
_RIGHTS = {
    "ListObjectsV2": "s3:ListBucket",
    **dict.fromkeys(("HeadObject", "GetObject"), "s3:GetObject"),
    **dict.fromkeys(("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"), "s3:PutObject"),
    "DeleteObject": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
}
"""The right that a request needs, by its name."""
REQUESTER_PAYS = "SIMCLR_S3_REQUESTER_PAYS"
"""Environment variable: names of buckets, with commas between them, whose requests this account pays."""
HOW_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or run where a role gives them"


class Missing(UserError):
    """There is no such object."""


class Damaged(UserError):
    """An object's bytes do not match its checksum or the manifest."""


class Unsupported(UserError):
    """The server does not know a part of the request; no retry mends it."""


class TooLarge(UserError):
    """An object that is to be read into memory has more bytes than any such object."""


class Retry(Exception):
    """A failure that a retry may mend."""


class Changed(Retry):
    """The object has changed since its download began."""


def reason_of(error: boto.ClientError, place: Address, signs: bool = True, works: bool = False) -> str:
    """Status and code of an error that a retry may mend. Raises Changed, Missing, Unreachable or UserError for all others.

    `signs`: whether the request had credentials; `works`: whether S3 has granted an earlier one with them.
    """
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = re.sub(r"\W", "", str(error.response.get("Error", {}).get("Code", "")))[:64]
    if code in ("PreconditionFailed", "InvalidRange") or status in (412, 416):
        raise Changed("an object that changed while it was fetched") from None
    if status == 501 or code == "NotImplemented":
        raise Unsupported(f"the server of {place} does not know this request ({status} {code}); use another store") from None
    if status >= 500 or status == 429 or code in _PASSING or status < 300:  # 200 with an error in its body
        return f"{status} {code}".removesuffix(f" {status}")
    if code == "NoSuchBucket":
        raise Missing(f"there is no bucket {place.bucket} for {place}; make it, or correct the address") from None
    if status == 404:
        raise Missing(f"there is no {place}; correct the address") from None
    what = f"{status} {code}".removesuffix(f" {status}")
    if code in _ENDED or (works and code == "InvalidAccessKeyId"):
        return _ended(what, place, works)
    if code == "RequestTimeTooSkewed":
        raise UserError(f"S3 refuses {place} ({what}): this machine's clock is wrong, {time.strftime('%F %T %Z')}; set it (NTP)") from None
    if status in (401, 403) or "Token" in code:
        raise UserError(_refusal(error, place, code, what, signs)) from None
    if region := error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region", ""):
        raise UserError(f"the bucket of {place} is in region {printable(region)[:40]} ({what}); set AWS_DEFAULT_REGION to that") from None
    raise UserError(f"S3 refuses the request for {place} ({what}); check the address, the region and the endpoint") from None


def refuses(error: boto.ClientError) -> bool:
    """Whether S3 wants other credentials; of a HEAD, whose answer has no body, whether it may."""
    status, code = (int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)), error.response.get("Error", {}).get("Code"))
    return status in (401, 403) or code in _ENDED or (status == 400 and error.operation_name == "HeadObject")


def lacking(error: Exception, place: Address, works: bool) -> str:
    """The reason why there are no credentials, if a retry may mend it. Raises UserError, and Unreachable where they have ended."""
    if isinstance(error, boto.TokenRetrievalError | boto.SSOError):
        return _ended(type(error).__name__, place, works)
    raise UserError(f"no AWS credentials for {place}; {HOW_CREDENTIALS}") from None


def cure_of(reason: str) -> str:
    """What a user can do against the `reason` of a retry."""
    return _RENEW if reason.startswith(_OVER) else "check the network and the endpoint"


def payers() -> frozenset[str]:
    """Buckets whose requests this account pays, since their owner does not."""
    return frozenset(os.environ.get(REQUESTER_PAYS, "").replace(",", " ").split())


def _ended(what: str, place: Address, works: bool) -> str:
    """The reason for a retry where credentials have ended that have worked: others may come. Raises Unreachable if they never have."""
    if not works:
        raise Unreachable(f"S3 refuses {place}: {_OVER} ({what}); {_RENEW}, then run the same command again") from None
    return f"{_OVER} ({what})"


def _refusal(error: boto.ClientError, place: Address, code: str, what: str, signs: bool) -> str:
    """The sentence for a request that these credentials may not make, with the right that they lack as S3 or the request tells it."""
    if not signs:
        return f"no AWS credentials for {place}, and it is not public ({what}); {HOW_CREDENTIALS}"
    told = re.search(r"\b(?:s3|kms):[A-Z][A-Za-z]{2,40}\b", str(error.response.get("Error", {}).get("Message", "")))
    right = told[0] if told else _RIGHTS.get(error.operation_name, "")
    if code not in ("AccessDenied", str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"))) or not right:
        return f"S3 refuses {place} to these credentials ({what}); get permission for it, or {HOW_CREDENTIALS}"
    if right == "s3:ListBucket":
        right += f" for the bucket {place.bucket}"
    elif right == "s3:GetObject":  # S3 tells nobody that an object is missing who may not list
        right += f", or, if there is no such object, s3:ListBucket for the bucket {place.bucket}"
    pay = f"; if its readers pay for it, name the bucket in {REQUESTER_PAYS}" if place.bucket not in payers() and "kms" not in right else ""
    return f"S3 refuses {place} to these credentials ({what}): they lack {right}; get that right, or {HOW_CREDENTIALS}{pay}"


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
