"""Which tests run in one process, one after the other, and which groups of them begin first.

pytest-xdist gives whole groups to its processes. A group is what must not run at the same time, or
what shares something that takes long to make; all other tests are grouped by their file.
"""

from __future__ import annotations

import pytest

# By fixture; a fixture for the session is made once if one group has all tests that use it.
SHARED = {
    "cluster": "ray",
    "postgres": "postgresql",
    "finished_study": "study",
    "browser": "study",
}
# By time, the longest first, so that none is left to one process in the end; then files in order.
FIRST = (
    "ray",
    "cli/test_cli.py",
    "postgresql",
    "test_faults.py",
    "test_engine.py",
    "study",
    "hw_models/test_host.py",
    "cli/test_profile.py",
    "cli/test_interrupts.py",
    "test_comparison.py",
    "strategies/supernet/test_haloc.py",
    "strategies/test_strategies.py",
    "test_full_disk.py",
    "decompositions/test_operators.py",
)


def group_of(item: pytest.Item) -> str:
    """The name of the group of a test."""
    names = set(getattr(item, "fixturenames", ()))
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("shared") == "postgresql":
        names.add("postgres")  # which the fixture `shared` asks for later
    for name, group in SHARED.items():
        if name in names:
            return group
    return item.nodeid.partition("::")[0].removeprefix("tests/")


def rank_of(item: pytest.Item) -> int:
    """The place of a test's group in `FIRST`; the sort is stable."""
    marker = item.get_closest_marker("xdist_group")
    group = str(marker.args[0]) if marker is not None else ""
    return FIRST.index(group) if group in FIRST else len(FIRST)
