"""One set of S3 settings for both clients: pyarrow's filesystem for bytes, delta-rs for the log.

Enters: `s3://bucket/prefix` and the standard AWS variables. Leaves: a `Connection` that both clients go through, with
retries and one-line errors. Costs: a client per set of settings and process, about 5 ms.

    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN   without keys: AWS' own chain (profile, role, instance)
    AWS_REGION or AWS_DEFAULT_REGION                             us-east-1 where only an endpoint is given
    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL                      another server than AWS
    AWS_ALLOW_HTTP                                               true, for an endpoint without TLS
    STILLROOM_S3_RETRY_S                                         how long a failing operation is tried again, 120

Keys are in no message, identity, snapshot or repr: they stay in this process' environment and in its clients.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa

from stillroom.storage.errors import StillroomError, StoreError, UsageError
from stillroom.storage.remote.retry import Backoff, GaveUp, retried

T = TypeVar("T")

SCHEME = "s3://"
_SHORTEST_KEY = 8

#: As long as no request of this process was ever answered, a wrong endpoint is likelier than a restarting server.
_UNANSWERED_S = 10.0

#: A request that moves no byte for so long (pyarrow), or is not done (delta-rs), has failed.
_CONNECT_S, _SILENT_S, _REQUEST_S = 5.0, 10.0, 30.0


@dataclass(frozen=True)
class Location:
    """prefix: "" or a path without slashes at its ends."""

    bucket: str
    prefix: str

    @staticmethod
    def parse(uri: str) -> "Location":
        """Raises StoreError where `uri` is not s3://bucket[/prefix]; credentials in it are not repeated."""
        if not uri.startswith(SCHEME):
            raise StoreError(f"store {uri}: expected s3://bucket/prefix")
        rest = uri.removeprefix(SCHEME)
        bucket, _, prefix = rest.rstrip("/").partition("/")
        if "@" in bucket:
            raise StoreError(
                "an s3:// URI holds no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and write "
                "s3://bucket/prefix"
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]", bucket):
            raise StoreError(f"store {uri}: {bucket!r} is no bucket's name; expected s3://bucket/prefix")
        parts = prefix.split("/") if prefix else []
        if any(part in ("", ".", "..") or set(part) & set("\\?#\0%") for part in parts):
            raise StoreError(
                f"store {uri}: the prefix {prefix!r} has an empty part, '.', '..' or one of \\ ? # %; "
                "expected s3://bucket/folder/folder"
            )
        return Location(bucket, prefix)

    @property
    def uri(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def path(self) -> str:
        """As pyarrow names it: bucket/prefix."""
        return f"{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True)
class S3Settings:
    """access_key, secret_key, session_token: None for AWS' own chain. endpoint: scheme://host[:port], None for AWS."""

    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region: str | None = None
    endpoint: str | None = None
    retry_s: float = Backoff.total_s

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> "S3Settings":
        """Raises UsageError naming the variable where they contradict one another."""
        env = {k: v.strip() for k, v in (os.environ if environment is None else environment).items() if v.strip()}
        access, secret = env.get("AWS_ACCESS_KEY_ID"), env.get("AWS_SECRET_ACCESS_KEY")
        if (access is None) != (secret is None):
            given, missing = ("ID", "SECRET") if access else ("SECRET", "ID")
            names = {"ID": "AWS_ACCESS_KEY_ID", "SECRET": "AWS_SECRET_ACCESS_KEY"}
            raise UsageError(f"{names[given]} is set and {names[missing]} is not: set both or none of them")
        endpoint = _endpoint(env)
        region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
        token = env.get("AWS_SESSION_TOKEN") if access else None
        return S3Settings(access, secret, token, region, endpoint, _retry_s(env))

    def filesystem_arguments(self) -> dict[str, Any]:
        """For pyarrow.fs.S3FileSystem, but for its retry strategy."""
        arguments: dict[str, Any] = {
            "access_key": self.access_key,
            "secret_key": self.secret_key,
            "session_token": self.session_token,
            "region": self.region,
            "connect_timeout": _CONNECT_S,
            "request_timeout": _SILENT_S,
            # A small object is then one PUT; otherwise every write is a multipart upload of three requests.
            "allow_delayed_open": True,
            "background_writes": False,
        }
        if self.endpoint:
            scheme, _, host = self.endpoint.partition("://")
            arguments |= {"scheme": scheme, "endpoint_override": host}
        return {name: value for name, value in arguments.items() if value is not None}

    def storage_options(self) -> dict[str, str]:
        """For deltalake."""
        options = {
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "aws_session_token": self.session_token,
            "aws_region": self.region,
            "aws_endpoint_url": self.endpoint,
            "aws_allow_http": "true" if self.endpoint and self.endpoint.startswith("http://") else None,
            # What makes a commit a compare-and-swap: PUT with If-None-Match. It is the default of deltalake 1.6, and
            # stated because delta-rs also reads AWS_CONDITIONAL_PUT from the environment.
            "aws_conditional_put": "etag",
            "connect_timeout": f"{_CONNECT_S:.0f}s",
            "timeout": f"{_REQUEST_S:.0f}s",
            # Opening a log is many requests; one that fails is worth another try before all of them are.
            "max_retries": "3",
            "retry_timeout": "10s",
        }
        return {name: value for name, value in options.items() if value is not None}

    def redacted(self, text: str) -> str:
        """`text` without the keys: servers echo what was signed.

        A key of a test server, "key" or "any", is a word that messages are full of; real ones have 16 characters or
        more.
        """
        for secret in (self.secret_key, self.session_token, self.access_key):
            text = text.replace(secret, "…") if secret and len(secret) >= _SHORTEST_KEY else text
        return text


def _endpoint(env: Mapping[str, str]) -> str | None:
    name = "AWS_ENDPOINT_URL_S3" if "AWS_ENDPOINT_URL_S3" in env else "AWS_ENDPOINT_URL"
    if name not in env:
        return None
    parts = urlsplit(env[name])
    if parts.username or parts.password:
        raise UsageError(f"{name} holds credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
        raise UsageError(f"{name} is {env[name]!r}, expected http(s)://host or http(s)://host:port")
    if parts.scheme == "http" and env.get("AWS_ALLOW_HTTP", "").lower() not in ("true", "1", "yes"):
        raise UsageError(
            f"{name} is {env[name]}, which is not encrypted: set AWS_ALLOW_HTTP=true if that is meant, or use https"
        )
    return f"{parts.scheme}://{parts.netloc}"


def _retry_s(env: Mapping[str, str]) -> float:
    text = env.get("STILLROOM_S3_RETRY_S", str(Backoff.total_s))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"STILLROOM_S3_RETRY_S is {text!r}, expected a number of seconds")
    return seconds


class Connection:
    """What a process knows of one server: the client, and whether it has ever answered. May be used by threads."""

    def __init__(self, settings: S3Settings) -> None:
        from pyarrow import fs

        self.settings = settings
        # One attempt a request: the waiting is ours, or two loops would multiply.
        strategy = fs.AwsStandardS3RetryStrategy(max_attempts=1)
        self.filesystem = fs.S3FileSystem(**settings.filesystem_arguments(), retry_strategy=strategy)
        self._answered = False

    def call(
        self,
        doing: str,
        uri: str,
        action: Callable[[], T],
        *,
        patient: bool = False,
        passing: tuple[type[Exception], ...] = (FileNotFoundError,),
        errors: tuple[type[Exception], ...] = (OSError, pa.ArrowException),
    ) -> T:
        """`action`, tried again while its errors may pass, for at most `settings.retry_s` seconds.

        doing, uri: for the message: "cannot {doing} {uri}". patient: whole time even where the server has not
        answered yet; for writes, since what they hold cost a teacher's time.
        passing: errors that are answers; they come out as they are, and at once. errors: the client's own; what is
        left of them becomes StoreError.
        """
        total_s = self.settings.retry_s
        if not (patient or self._answered):
            total_s = min(total_s, _UNANSWERED_S)
        final: tuple[type[Exception], ...] = (*passing, StillroomError)

        def transient(error: Exception) -> bool:
            return isinstance(error, errors) and not isinstance(error, final) and may_pass(str(error))

        try:
            value = retried(action, transient, Backoff(total_s))
        except GaveUp as spent:
            last = spent.__cause__
            assert isinstance(last, Exception)
            raise StoreError(
                f"cannot {doing} {uri}: {self.detail(last)}; gave up after {spent}: check AWS_ENDPOINT_URL and the "
                "network, then run the same command again"
            ) from last
        except final:
            self._answered = True
            raise
        except Exception as error:
            if not isinstance(error, errors):
                raise
            raise StoreError(f"cannot {doing} {uri}: {self.detail(error)}{_remedy(str(error), uri)}") from error
        self._answered = True
        return value

    def detail(self, error: Exception) -> str:
        """One line, of servers' answers the code and the message alone, without keys."""
        return self.settings.redacted(one_line(error))


@lru_cache(maxsize=8)
def _connection(settings: S3Settings) -> Connection:
    return Connection(settings)


def connect() -> Connection:
    """This process' connection for the settings that the environment has now. Raises UsageError."""
    return _connection(S3Settings.from_environment())


_DENIED = re.compile(
    r"ACCESS_DENIED|AccessDenied|Forbidden|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|"
    r"SignatureDoesNotMatch|necessary privileges|Unauthorized|ExpiredToken|EXPIRED_TOKEN|InvalidToken|INVALID_TOKEN|"
    r"INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|TooSkewed|TOO_SKEWED|[Nn]o credentials|credentials provider"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket")
_ELSEWHERE = re.compile(r"PermanentRedirect|PERMANENT_REDIRECT|301 Moved|HTTP status 301|AuthorizationHeaderMalformed")
_CERTIFICATE = re.compile(r"certificate", re.IGNORECASE)
_TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|error sending request|connection (reset|closed|refused|aborted)|broken pipe|"
    r"tim(ed|e) ?-?out|REQUEST_TIMEOUT|SLOW_?DOWN|THROTTL|SERVICE_UNAVAILABLE|INTERNAL_(FAILURE|ERROR)|InternalError|"
    r"ServiceUnavailable|HTTP status (5\d\d|429)|\b(500 Internal|502 Bad|503 Service|504 Gateway|429 Too)|"
    r"incomplete message|error decoding response body|unexpected (eof|end of file)",
    re.IGNORECASE,
)


def may_pass(text: str) -> bool:
    """Whether an error of either client, by its text, may be gone on another try.

    Neither client has error classes for this: pyarrow gives OSError with the AWS code in it, delta-rs the HTTP
    status line and the server's XML.
    """
    if _DENIED.search(text) or _NO_BUCKET.search(text) or _ELSEWHERE.search(text) or _CERTIFICATE.search(text):
        return False
    return bool(_TRANSIENT.search(text))


def _remedy(text: str, uri: str) -> str:
    if _NO_BUCKET.search(text):
        bucket = uri.removeprefix(SCHEME).partition("/")[0]
        return f"; create the bucket {bucket} or correct the URI"
    if _DENIED.search(text):
        return "; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and what they may do there"
    if _ELSEWHERE.search(text):
        return "; set AWS_REGION to the bucket's region"
    if _CERTIFICATE.search(text):
        return "; the server's TLS certificate is not trusted here"
    return ""


def one_line(error: Exception) -> str:
    """Without colours, arrows and request ids; of an XML body the code and message alone."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).replace("↳", ":")
    text = re.sub(r"(<\?xml.*?\?>\s*)?<Error>.*?(</Error>|\Z)", lambda body: _code_and_message(body.group()), text,
                  flags=re.DOTALL)  # fmt: skip
    text = " ".join(re.sub(r"\(Request ID: [^)]*\)", "", text).split()).replace(" : ", ": ").rstrip(".")
    text = re.sub(r"^When .* in bucket '[^']*': ", "", text)  # the caller says where
    text = re.sub(r" in [\d.]+(µs|ms|s)(, after \d+ retries, max_retries: \d+, retry_timeout: \S+)?", "", text)
    return text if len(text) <= 400 else text[:399] + "…"


def _code_and_message(body: str) -> str:
    found = [re.search(rf"<{tag}>(.*?)</{tag}>", body, re.DOTALL) for tag in ("Code", "Message")]
    return ", ".join(match.group(1) for match in found if match)
