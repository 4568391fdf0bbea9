"""Object stores by URL: `s3://`, `gs://`, `az://` and `http(s)://`, through obstore.

Configured by what the vendors' own tools read from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION,
AWS_ENDPOINT_URL, AWS_SKIP_SIGNATURE=true for public buckets; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME,
AZURE_STORAGE_ACCOUNT_KEY; or by the role of the machine. obstore tries requests again; what it gives up on is raised as an
error of ours, in one line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

SCHEMES = ("s3", "gs", "az", "http", "https")
_ALIASES = {"s3a": "s3", "azure": "az", "adl": "az", "abfs": "az", "abfss": "az"}
CONNECT_TIMEOUT_S = 10
REQUEST_TIMEOUT_S = 30
# Opening meets what the user mistyped and should say so soon; reading rides out a network that is gone for a while.
OPENING_RETRIES = 3
READING_RETRIES = 12
READING_RETRY_S = 60

_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_ACCESS = re.compile(
    r"credential|Missing ?AccessKeyId|Account must be specified|169\.254\.169\.254|/token", re.IGNORECASE
)
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist", re.I)
_REFUSED = re.compile(r"\b40[13]\b")


@dataclass(frozen=True, slots=True)
class ObjectUrl:
    """A URL in its parts. scheme: one of SCHEMES; root: scheme as written and bucket (with http: the server); key: the rest,
    without a slash in front."""

    url: str
    scheme: str
    root: str
    key: str

    @property
    def is_folder(self) -> bool:
        """Written as a folder: with a slash at the end, or as a bucket alone."""
        return not self.key or self.key.endswith("/")


def parse_object_url(url: str) -> ObjectUrl | None:
    """The parts, or None for what is no URL of an object store. Raises ConfigurationError for one that cannot be meant."""
    written, separator, rest = url.partition("://")
    scheme = _ALIASES.get(written, written)
    if not separator or scheme not in SCHEMES:
        return None
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise ConfigurationError(f"{url}: names no bucket; it should look like {written}://BUCKET/KEY")
    if scheme.startswith("http") and ("?" in key or "#" in key or "@" in bucket):
        raise ConfigurationError(
            f"{scheme}://{bucket.rpartition('@')[2]}/...: addresses with a query, a fragment or a password are not read; "
            "download the file first"
        )
    return ObjectUrl(url, scheme, f"{written}://{bucket}", key)


def open_objects(
    url: ObjectUrl,
    *,
    retries: int = READING_RETRIES,
    retry_s: float = READING_RETRY_S,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> ObjectStore:
    """The store of the whole bucket. Does not connect. Raises ConfigurationError for a set-up that cannot work."""
    try:
        from obstore.store import from_url
    except ImportError:
        raise missing_extra(url.url) from None
    check_endpoint(s3_endpoint())
    client: ClientConfig = {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "timeout": timedelta(seconds=timeout_s),
    }
    retry: RetryConfig = {"max_retries": retries, "retry_timeout": timedelta(seconds=retry_s)}
    with explained(url):
        store: ObjectStore = from_url(url.root, client_options=client, retry_config=retry)
    return store


def missing_extra(url: str) -> ConfigurationError:
    return ConfigurationError(f"{url}: object stores need obstore: pip install 'embedmill[objects]'")


def s3_endpoint() -> str | None:
    """The address of an S3 that is not Amazon's; None where none is set."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name] for name in names if name in os.environ), None)


def check_endpoint(endpoint: str | None) -> None:
    """Raises ConfigurationError for an address on which the client would not fail but panic."""
    if endpoint is None:
        return
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(
            f"AWS_ENDPOINT_URL is {endpoint!r}: an address looks like https://HOST or http://HOST:PORT"
        )


@contextmanager
def explained(url: ObjectUrl) -> Iterator[None]:
    """Turn what obstore raises into our errors, with the URL in front.

    Raises: ConfigurationError for what does not exist or may not be read, StorageError for the network and the server.
    """
    from obstore import exceptions as obstore_errors

    try:
        yield
    except FileNotFoundError:
        raise ConfigurationError(f"{url.url}: no such bucket or object") from None
    except (obstore_errors.PermissionDeniedError, obstore_errors.UnauthenticatedError):
        raise ConfigurationError(f"{url.url}: access denied{advise(url)}") from None
    except obstore_errors.PreconditionError:
        raise StorageError(f"{url.url}: it was changed while it was read; run the same command again") from None
    except obstore_errors.NotSupportedError:
        raise ConfigurationError(
            f"{url.url}: the server hands out no parts of files, only whole ones; download it first"
        ) from None
    except (obstore_errors.BaseError, OSError, ValueError) as error:
        raise explain(error, url=url) from None


def is_bucket_missing(error: Exception) -> bool:
    """Whether a server said so that there is no such bucket; of a HEAD it says nothing."""
    return _NO_BUCKET.search(str(error)) is not None


def explain(error: Exception, *, url: ObjectUrl) -> ConfigurationError | StorageError:
    """An error that obstore does not class itself: it only has its words."""
    line = first_cause(str(error))
    if is_bucket_missing(error):
        return ConfigurationError(f"{url.url}: no such bucket")
    if _ACCESS.search(line) or _REFUSED.search(line):
        return ConfigurationError(f"{url.url}: no credentials that work{advise(url)} ({line})")
    return StorageError(f"{url.url}: cannot be reached: {line}; the same command goes on")


def advise(url: ObjectUrl) -> str:
    return f": {_CREDENTIALS[url.scheme]}" if url.scheme in _CREDENTIALS else ""


def first_cause(said: str) -> str:
    """The first line of a long error, without the parts that carry no news, and the server's own word for it."""
    line = (said.splitlines() or ["unknown error"])[0]
    line = re.sub(r"^(Generic \w+ error: )?(Error performing )?(list request: Error performing )?", "", line)
    line = re.sub(r" in [\d.]+[mnµ]?s - ", ": ", line).partition(": <")[0][:300].rstrip(" :")
    code = re.search(r"<Code>(\w+)</Code>", said)
    return f"{line} ({code[1]})" if code else line
