"""Processes of their own, which need not import torch each time."""

from __future__ import annotations

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
# Not the modules of the tests: the server has no path to them.
FORKS.set_forkserver_preload(
    ["rankNAS.storage.store", "optuna", "sqlalchemy", "alembic", "psycopg"]
)
