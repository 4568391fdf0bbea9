"""URLs of Redis: what they mean, and what a wrong one says without showing a password."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedmill.errors import ConfigurationError
from embedmill.redis_address import parse_redis_url


def test_a_login_and_a_database_are_read_and_only_the_password_is_hidden() -> None:
    address = parse_redis_url("redis://worker:p%40s%2Fs%23%25@cache.example:6380/3")
    assert (address.kind, address.hosts, address.db) == ("server", (("cache.example", 6380),), 3)
    assert (address.username, address.password) == ("worker", "p@s/s#%")
    assert address.shown == "redis://worker:***@cache.example:6380/3"
    assert "p@s" not in repr(address)


def test_what_is_left_out_has_defaults() -> None:
    assert parse_redis_url("redis://").hosts == (("localhost", 6379),)
    assert parse_redis_url("redis://[::1]").hosts == (("::1", 6379),)
    address = parse_redis_url("redis+sentinel://a,b:1/orders")
    assert (address.hosts, address.service, address.db) == ((("a", 26379), ("b", 1)), "orders", 0)


def test_a_socket_has_a_path_and_may_have_a_login_and_a_database() -> None:
    address = parse_redis_url("unix://user:secret@/run/redis%20a.sock?db=2")
    assert (address.path, address.db, address.username, address.password) == ("/run/redis a.sock", 2, "user", "secret")
    assert address.shown == "unix://user:***@/run/redis%20a.sock?db=2"
    assert parse_redis_url("unix:///run/s").shown == "unix:///run/s"


def test_sentinels_have_a_login_of_their_own() -> None:
    address = parse_redis_url("rediss+sentinel://u:one@h/main/4?sentinel_username=s&sentinel_password=t%26wo")
    assert (address.kind, address.secure, address.service, address.db) == ("sentinel", True, "main", 4)
    assert (address.sentinel_username, address.sentinel_password) == ("s", "t&wo")
    assert address.shown == "rediss+sentinel://u:***@h/main/4?sentinel_username=s&sentinel_password=***"


def test_tls_options_keep_the_names_of_redis_py(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.touch()
    address = parse_redis_url(f"rediss+cluster://h?ssl_ca_certs={file}&ssl_check_hostname=No&ssl_cert_reqs=required")
    assert address.tls == {"ssl_ca_certs": str(file), "ssl_check_hostname": False, "ssl_cert_reqs": "required"}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense", "it must begin with redis://"),
        ("localhost:6379", "it must begin with"),
        ("http://h", "it must begin with"),
        ("redis://h:port", "a port is a number"),
        ("redis://h:70000", "a port is a number"),
        ("redis://h/zero", "the database is a number, not 'zero'"),
        ("redis://a,b", "several hosts need redis+sentinel:// or redis+cluster://"),
        ("redis+sentinel://h", "the name of the service is missing"),
        ("redis+cluster://h/1", "a cluster has no database but 0"),
        ("redis+cluster://h,,i", "a host is missing"),
        ("unix://run/redis.sock", "three slashes"),
        ("redis://h?sl_ca_certs=x", "there is no parameter 'sl_ca_certs', but ssl_ca_certs"),
        ("redis://h?socket_timeout=1", "there is no parameter 'socket_timeout', only db"),
        ("redis://h?ssl_cert_reqs=none", "needs TLS: write rediss"),
        ("rediss://h?ssl_cert_reqs=maybe", "ssl_cert_reqs takes none, optional, required"),
        ("rediss://h?ssl_ca_certs=/nowhere/ca.pem", "there is no file /nowhere/ca.pem for ssl_ca_certs"),
    ],
)
def test_a_wrong_url_says_what_is_wrong_with_it(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_redis_url(url)
    assert reason in str(refused.value)
    assert "is not a Redis URL" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret/secret@h:1",
        "redis://:secret#secret@h:1",
        "redis://:secret?secret@h:1",
        "redis://u:secret@secret@h:x",
        "redis://:secret",
        "redis://u:secret@h?password=secret",
        "redis+sentinel://u:secret@h?sentinel_password=secret",
        "rdis://u:secret@h",
    ],
)
def test_a_wrong_url_never_shows_a_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_redis_url(url)
    assert "secret" not in str(refused.value)
