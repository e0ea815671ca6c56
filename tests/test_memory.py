"""Free memory goes back to the system where the C library can return it."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from rankNAS.memory import give_back


def test_free_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: the C library keeps 0 bytes at the end of its heap."""
    kept: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=kept.append))
    give_back()
    assert kept == [0]


@pytest.mark.parametrize("error", [OSError, TypeError, None])
def test_another_c_library_is_no_error(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None
) -> None:
    def loaded(name: None) -> SimpleNamespace:
        if error is not None:
            raise error("no such library")
        return SimpleNamespace()  # without malloc_trim

    monkeypatch.setattr(ctypes, "CDLL", loaded)
    give_back()
