"""Where a Redis is, read from a URL: one server, a master that Sentinels name, or a cluster. Passwords stay inside."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from .errors import ConfigurationError

Kind = Literal["server", "sentinel", "cluster"]

_SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("server", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_EXAMPLES: dict[Kind, str] = {
    "server": "redis://localhost:6379/0",
    "sentinel": "redis+sentinel://HOST:26379,HOST2:26379/SERVICE",
    "cluster": "redis+cluster://HOST:6379,HOST2:6379",
}
_PORTS: dict[Kind, int] = {"server": 6379, "sentinel": 26379, "cluster": 6379}
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS = (*_TLS_FILES, "ssl_cert_reqs", "ssl_check_hostname")
_SENTINEL = ("sentinel_username", "sentinel_password")
_SECRET = re.compile(r"(password=)[^&#]*")
_NO_PORT = re.compile(r"(?<=^):[^/,\]]*[^\d/,\]][^/,\]]*|(?<=[\w.]):[^/,\]]*[^\d/,\]][^/,\]]*")
_CHOICES: dict[str, dict[str, str | bool]] = {
    "ssl_cert_reqs": {"none": "none", "optional": "optional", "required": "required"},
    "ssl_check_hostname": {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False},
}


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """hosts: of the server, of the Sentinels, or of some nodes of the cluster. path: a Unix socket instead of hosts.

    service: what the Sentinels call the master. tls: the `ssl_...` options as redis-py names them. shown: fit for logs.
    """

    kind: Kind
    shown: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    service: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    secure: bool = False
    tls: Mapping[str, str | bool] = field(default_factory=dict)


def parse_redis_url(url: str) -> RedisAddress:
    """Raises ConfigurationError, with one line that shows no password, for what is no URL of a Redis."""
    scheme = url.partition("://")[0] if "://" in url else ""
    if scheme not in _SCHEMES:
        raise _wrong(url, "server", f"it must begin with {'://, '.join(_SCHEMES)}://")
    kind, secure = _SCHEMES[scheme]
    try:
        return _parse(urlsplit(url), kind, secure)
    except ValueError as error:
        raise _wrong(url, kind, str(error)) from None


def without_password(url: str) -> str:
    """What can be shown of a URL that may be wrong: nothing before its last @, and no port that is not a number."""
    scheme, separator, rest = _SECRET.sub(r"\1***", url).partition("://")
    if "@" in rest:
        rest = f"***@{rest.rpartition('@')[2]}"
    return f"{scheme}{separator}{_NO_PORT.sub(':***', rest, count=1)}"


def _wrong(url: str, kind: Kind, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"--redis {without_password(url)!r} is not a Redis URL: {reason}; it looks like {_EXAMPLES[kind]}"
    )


def _parse(parts: SplitResult, kind: Kind, secure: bool) -> RedisAddress:
    # Nothing after an unencoded / or # of a password may be taken for a host, a port or a path, and be shown as one.
    if "@" not in parts.netloc and "@" in parts.path + parts.query + parts.fragment and parts.scheme != "unix":
        raise ValueError("write / as %2F, ? as %3F and # as %23 in a user's name or password")
    if parts.fragment:
        raise ValueError("it has a # part; in a user's name or password write # as %23")
    login, _, place = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    options = _options(parts.query, kind, secure)
    tls = {name: options[name] for name in _TLS if name in options}
    hosts: tuple[tuple[str, int], ...] = ()
    path = service = db = ""
    if parts.scheme == "unix":
        if place or not parts.path.strip("/"):
            raise ValueError("the path of the socket has three slashes before it, as in unix:///run/redis.sock")
        path = unquote(parts.path)
    else:
        hosts = _hosts(place, kind)
        service, db = _service_and_db(unquote(parts.path.strip("/")), kind)
    if "db" in options:
        db = str(options["db"])
    if db and not db.isdecimal():
        raise ValueError(f"the database is a number, not {db!r}")
    if kind == "cluster" and int(db or 0):
        raise ValueError("a cluster has no database but 0")
    return RedisAddress(
        kind=kind,
        shown=_shown(parts, login, place),
        hosts=hosts,
        path=path,
        service=service,
        db=int(db or 0),
        username=unquote(username) or None,
        password=unquote(password) or None,
        sentinel_username=_text(options.get("sentinel_username")),
        sentinel_password=_text(options.get("sentinel_password")),
        secure=secure,
        tls=tls,
    )


def _shown(parts: SplitResult, login: str, place: str) -> str:
    user, colon, _ = login.partition(":")
    masked = f"{user}:***@" if colon else f"{user}@" if user else ""
    query = f"?{parts.query}" if parts.query else ""
    return _SECRET.sub(r"\1***", f"{parts.scheme}://{masked}{place}{parts.path}{query}")


def _hosts(place: str, kind: Kind) -> tuple[tuple[str, int], ...]:
    names = place.split(",") if place else ["localhost"]
    if kind == "server" and len(names) > 1:
        raise ValueError("several hosts need redis+sentinel:// or redis+cluster://")
    hosts = []
    for name in names:
        one = urlsplit(f"//{name}")
        try:
            host, port = one.hostname, one.port
        except ValueError:
            raise ValueError("a port is a number up to 65535; in a password write / as %2F and @ as %40") from None
        if not host:
            raise ValueError("a host is missing")
        hosts.append((unquote(host), port or _PORTS[kind]))
    return tuple(hosts)


def _service_and_db(path: str, kind: Kind) -> tuple[str, str]:
    if kind != "sentinel":
        return "", path
    service, _, db = path.partition("/")
    if not service:
        raise ValueError("the name of the service is missing, as the Sentinels call it")
    return service, db


def _options(query: str, kind: Kind, secure: bool) -> dict[str, str | bool]:
    allowed = ["db", *_TLS, *(_SENTINEL if kind == "sentinel" else ())]
    options: dict[str, str | bool] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            raise ValueError(
                f"there is no parameter {name!r}, {f'but {near[0]}' if near else 'only ' + ', '.join(allowed)}"
            )
        if name in _TLS and not secure:
            raise ValueError(f"{name} needs TLS: write rediss instead of redis in front of ://")
        if name in _TLS_FILES and not Path(value).is_file():
            raise ValueError(f"there is no file {value} for {name}")
        options[name] = _CHOICES[name].get(value.lower(), "") if name in _CHOICES else value
        if options[name] == "":
            raise ValueError(f"{name} takes {', '.join(_CHOICES.get(name, {'a value': ''}))}")
    return options


def _text(value: str | bool | None) -> str | None:
    return None if value is None else str(value)
