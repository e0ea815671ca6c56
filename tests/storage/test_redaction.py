"""Passwords stay out of texts."""

from __future__ import annotations

from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from rankNAS.storage import redaction
from rankNAS.storage.redaction import redacted, remember, without_password

SECRETS = st.text(min_size=4, max_size=20).filter(lambda s: s.strip() == s and s.isprintable())


@given(SECRETS)
def test_a_password_in_its_place_is_hidden(secret: str) -> None:
    url = f"postgresql://someone:{quote(secret, safe='')}@somewhere/else"
    assert redacted(f"no route to {url} at all") == (
        "no route to postgresql://someone:***@somewhere/else at all"
    )
    assert make_url(without_password(url)) == make_url("postgresql://someone@somewhere/else")


@pytest.mark.parametrize("secret", ["p@ss@word", "a/b?c", "#:&%", "it's", 'say"it"'])
def test_a_password_that_is_not_percent_encoded_is_hidden(secret: str) -> None:
    assert redacted(f"postgresql://someone:{secret}@here/db") == "postgresql://someone:***@here/db"


@pytest.mark.parametrize(
    "name", ["password", "sslpassword", "PWD", "token", "auth_token", "client_secret", "api-key"]
)
def test_passwords_in_queries(name: str) -> None:
    url = f"postgresql://me@host/db?sslmode=require&{name}=hunter2&a=b"
    assert "hunter2" not in redacted(url)
    assert "sslmode=require" in redacted(url) and "a=b" in redacted(url)
    assert without_password(url) == "postgresql://me@host/db?sslmode=require&a=b"


def test_a_name_in_a_query_may_be_percent_encoded() -> None:
    assert without_password("postgresql:///db?user=me&pass%77ord=x") == "postgresql:///db?user=me"


def test_what_has_no_password_stays() -> None:
    for url in (
        "sqlite:///study.db",
        "journal:/tmp/a b.log",
        "postgresql://host/db?options=a@b",
        "postgresql://me@host:5432/db",
        "mysql+pymysql://me@[::1]/db?charset=utf8mb4",
    ):
        assert redacted(url) == without_password(url) == url


def test_what_is_remembered_is_found_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", set())
    remember("se cret/1")
    remember("abc")  # too short: a common word
    remember(None)
    forms = "se cret/1", quote("se cret/1", safe=""), quote_plus("se cret/1"), quote("se cret/1")
    for form in forms:
        assert redacted(f"could not translate host name {form!r} abc") == (
            "could not translate host name '***' abc"
        )
