"""Redaction of passwords in messages, logs and files.

A password is recognised by its position in a URL, or by its text after a call of `remember`.
"""

from __future__ import annotations

import re
from urllib.parse import quote, quote_plus, unquote_plus

__all__ = ["HIDDEN", "redacted", "remember", "without_password"]

HIDDEN = "***"
SHORTEST = 4  # characters; shorter passwords would match ordinary words
_secrets: set[str] = set()

_WORDS = r"[\w.%-]*(?:passw(?:or)?d|passphrase|pwd|secret|token|api[_-]?key|odbc_connect)[\w.%-]*"
# Up to the last @ of the word: a password without percent-encoding may contain one.
_IN_AUTHORITY = re.compile(r"(?P<before>://[^\s:/@'\"]*:)[^\s]*@")
# As SQLAlchemy reads it: the password ends at the first @.
_LOGIN = re.compile(r"(?P<user>[\w+]+://[^:/?@]*):[^@]*@")
_IN_QUERY = re.compile(rf"(?P<before>(?<![\w.%-]){_WORDS}=)[^&\s'\"]+", re.IGNORECASE)


def remember(secret: str | None) -> None:
    """Register a password for `redacted`, plain and percent-encoded."""
    if secret and len(secret) >= SHORTEST:
        _secrets.update({secret, quote(secret, safe=""), quote_plus(secret), quote(secret)})


def redacted(text: object) -> str:
    """The text with its passwords replaced by ``***``.

    >>> redacted("no route to postgresql://me:pa%20ss@host/db?sslpassword=abc&a=b")
    'no route to postgresql://me:***@host/db?sslpassword=***&a=b'
    """
    found = str(text)
    for secret in sorted(_secrets, key=len, reverse=True):
        found = found.replace(secret, HIDDEN)
    found = _IN_AUTHORITY.sub(rf"\g<before>{HIDDEN}@", found)
    return _IN_QUERY.sub(rf"\g<before>{HIDDEN}", found)


def without_password(url: str) -> str:
    """The URL without its secrets, for storage in a file.

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
