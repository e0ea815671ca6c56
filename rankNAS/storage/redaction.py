"""Passwords stay out of messages, logs and files.

A password is known by its place, in a URL, or by its text, once `remember` was told it.
"""

from __future__ import annotations

import re
from urllib.parse import quote, quote_plus, unquote_plus

__all__ = ["HIDDEN", "redacted", "remember", "without_password"]

HIDDEN = "***"
SHORTEST = 4  # a remembered text that is shorter would be found in ordinary words
_secrets: set[str] = set()

_WORDS = r"[\w.%-]*(?:passw(?:or)?d|passphrase|pwd|secret|token|api[_-]?key|odbc_connect)[\w.%-]*"
# Up to the last @ of the word: a password that should have been percent-encoded may hold one.
_IN_AUTHORITY = re.compile(r"(?P<before>://[^\s:/@'\"]*:)[^\s]*@")
# As SQLAlchemy reads it: the password ends at the first @.
_LOGIN = re.compile(r"(?P<user>[\w+]+://[^:/?@]*):[^@]*@")
_IN_QUERY = re.compile(rf"(?P<before>(?<![\w.%-]){_WORDS}=)[^&\s'\"]+", re.IGNORECASE)


def remember(secret: str | None) -> None:
    """Take note of a password, so that `redacted` finds it anywhere, percent-encoded or not."""
    if secret and len(secret) >= SHORTEST:
        _secrets.update({secret, quote(secret, safe=""), quote_plus(secret), quote(secret)})


def redacted(text: object) -> str:
    """A text without the passwords of the URLs in it.

    >>> redacted("no route to postgresql://me:pa%20ss@host/db?sslpassword=abc&a=b")
    'no route to postgresql://me:***@host/db?sslpassword=***&a=b'
    """
    found = str(text)
    for secret in sorted(_secrets, key=len, reverse=True):
        found = found.replace(secret, HIDDEN)
    found = _IN_AUTHORITY.sub(rf"\g<before>{HIDDEN}@", found)
    return _IN_QUERY.sub(rf"\g<before>{HIDDEN}", found)


def without_password(url: str) -> str:
    """A URL with everything that is secret left out, to be kept in a file.

    >>> without_password("postgresql://me:secret@host/db?sslpassword=abc&sslmode=require")
    'postgresql://me@host/db?sslmode=require'
    >>> without_password("sqlite:///study.db")
    'sqlite:///study.db'
    """
    found = _LOGIN.match(url)
    kept = f"{found['user']}@{url[found.end() :]}" if found else url
    address, mark, query = kept.partition("?")
    fields = [f for f in query.split("&") if not _is_secret(f.partition("=")[0])]
    return address + (mark + "&".join(fields) if fields else "")


def _is_secret(name: str) -> bool:
    return re.fullmatch(_WORDS, unquote_plus(name), re.IGNORECASE) is not None
