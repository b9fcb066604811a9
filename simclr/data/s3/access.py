"""With whose credentials S3 is asked: those of boto3's chain, looked for anew when they end during a run, or none for what is public.

boto3 renews by itself what a role gives. It never looks again at a file that a person or a batch system has renewed, and without
credentials it refuses to ask.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import boto3
from botocore import UNSIGNED
from botocore import exceptions as boto
from botocore.config import Config
from botocore.session import get_session

from simclr import proxy
from simclr.data.s3 import answers
from simclr.data.s3.uri import Address
from simclr.errors import UserError

T = TypeVar("T")
_SESSIONS = 4  # in one request: more would mean that credentials change faster than they are used
_READS = ("ListObjectsV2", "HeadObject", "GetObject")


@contextlib.contextmanager
def patient(answer_s: float) -> Iterator[None]:
    """Inside, clients that other libraries make with boto3's default session wait `answer_s` seconds for an answer, in place of 60."""
    before, session = boto3.DEFAULT_SESSION, get_session()
    session.set_default_client_config(Config(read_timeout=answer_s))
    boto3.setup_default_session(botocore_session=session)
    try:
        yield
    finally:
        boto3.DEFAULT_SESSION = before


class Access:
    """boto3's client for S3, `client`, and the ways to a better one. Several threads may use it at once.

    Raises UserError if the settings for AWS in the environment cannot be used.
    """

    def __init__(self, answer_s: float, connections: int) -> None:
        """`answer_s`: timeout of an answer; `connections`: as many at a time."""
        # At DEBUG botocore logs signatures and headers, also if another library has set the root logger's level.
        logging.getLogger("botocore").setLevel(logging.WARNING)
        self.settings = Config(
            retries={"total_max_attempts": 1},
            connect_timeout=min(answer_s, 5.0),
            read_timeout=answer_s,
            max_pool_connections=connections,
            # Every upload has an MD5. All stores check it, also those that do not know the newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self.lock = threading.Lock()
        proxy.spare_this_machine()
        self.works = False
        """Whether S3 has granted a request with these credentials."""
        self.signs = True
        try:
            self.session = boto3.session.Session()
            self.client = self._made(self.session, self.settings)
        except ValueError:
            raise UserError("the S3 endpoint in the environment is no address; expected AWS_ENDPOINT_URL_S3=http(s)://HOST:PORT") from None
        except boto.BotoCoreError as error:
            raise UserError(f"boto3 finds no usable AWS settings ({type(error).__name__}); {answers.HOW_CREDENTIALS}") from None

    def ask(self, request: Callable[[], T], place: Address, says: Callable[[str], None]) -> T:
        """The result of `request`, which uses `client`. Where S3 refuses it, or there are no credentials, it is asked again with those that
        a new session of boto3 finds. Where that finds none at all, it is read without a signature, which is said.

        Raises boto3's error where there are no other credentials.
        """
        public = ""
        for _ in range(_SESSIONS):
            used = self.client
            try:
                result = request()
                self.works = True
                if public:
                    says(public)
                return result
            except boto.ClientError as error:
                if not (answers.refuses(error) and self._renewed(used)):
                    raise
            except answers.CREDENTIALS as error:
                if self._renewed(used):
                    continue
                if not (isinstance(error, boto.NoCredentialsError) and self._unsigned(used)):
                    raise
                public = f"no AWS credentials: s3://{place.bucket} is read without a signature, as a public bucket"
            except RuntimeError as error:  # boto3's own, where a role's new credentials have ended too
                if "credentials" not in str(error):
                    raise
                raise boto.CredentialRetrievalError(provider="a role", error_msg="they have ended") from None
        return request()

    def worded(self, place: Address, error: boto.ClientError) -> boto.ClientError:
        """The `error` of a HEAD, whose answer has no body, as a GET of a byte tells it: with the code of a refusal."""
        if answers.refuses(error):
            try:
                self.client.get_object(Bucket=place.bucket, Key=place.key, Range="bytes=0-0")["Body"].close()
            except boto.ClientError as worded:
                return worded if answers.refuses(worded) else error
        return error

    def _renewed(self, used: Any) -> bool:
        """Whether there are other credentials than the client `used` has; then `client` has them."""
        with self.lock:
            if self.client is not used:  # another thread was faster
                return True
            try:
                session = boto3.session.Session()
                keys = _keys(session)
                if keys is None or (self.signs and keys == _keys(self.session)):
                    return False
                self.client = self._made(session, self.settings)
            except (boto.BotoCoreError, ValueError):  # the settings for AWS have been changed to none
                return False
            self.session, self.signs = session, True
            return True

    def _unsigned(self, used: Any) -> bool:
        """Let `client` read without a signature from now on. False where the client `used` has done so already."""
        with self.lock:
            if self.client is used and self.signs:
                client = self._made(self.session, self.settings.merge(Config(signature_version=UNSIGNED)))
                client.meta.events.register("before-call.s3", _require_reading)
                self.client, self.signs = client, False
            return self.client is not used

    def _made(self, session: boto3.session.Session, settings: Config) -> Any:
        client = session.client("s3", config=settings)
        if payers := answers.payers():
            client.meta.events.register("before-parameter-build.s3", lambda params, model, **_: _pay(params, model, payers))
        return client


def _keys(session: boto3.session.Session) -> tuple[str | None, ...] | None:
    """What `session` signs with; None where there is nothing, or it does not come."""
    try:
        found = session.get_credentials()
        return None if found is None else tuple(found.get_frozen_credentials())[:3]
    except (boto.BotoCoreError, boto.ClientError, RuntimeError):
        return None


def _require_reading(model: Any, **_: Any) -> None:
    """Nothing is written without credentials, even where a bucket would take it."""
    if model.name not in _READS:
        raise boto.NoCredentialsError


def _pay(params: dict[str, Any], model: Any, payers: frozenset[str]) -> None:
    if params.get("Bucket") in payers and "RequestPayer" in model.input_shape.members:
        params["RequestPayer"] = "requester"
