"""Opening storages: forms, passwords, damaged files."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import traceback
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from postgres import PASSWORD, Cluster, free_port
from store_worker import ALLOCATIONS, TARGET, evaluated, opened

from rankNAS.exceptions import StudyError
from rankNAS.storage import backends as module
from rankNAS.storage.backends import open_storage, storage_name
from rankNAS.storage.store import Claim, study_names
from rankNAS.strategies.history import Trial


def filled(storage: str, n: int = 12) -> tuple[Trial, ...]:
    """A study with some trials; what they are, but for the time they took."""
    with opened(storage) as store:
        for allocation in ALLOCATIONS[:n]:
            store.add(evaluated(Claim(allocation, TARGET)), ("accuracy",))
        return store.history().trials


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, tuple[Trial, ...]]:
    """What is in a journal, and its trials."""
    path = tmp_path_factory.mktemp("journal") / "study.log"
    trials = filled(f"journal:{path}")
    return path.read_bytes(), trials


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, tuple[Trial, ...]]:
    """What is in a database when all processes are gone, and its trials."""
    path = tmp_path_factory.mktemp("database") / "study.db"
    trials = filled(f"sqlite:///{path}")
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path.read_bytes(), trials


# ------------------------------------------------------------------------------- forms


def test_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("sqlite:///a.db", "b.db", "c.sqlite", f"sqlite:///{tmp_path}/d.db"):
        assert isinstance(open_storage(text), optuna.storages.RDBStorage)
    for text in ("journal:a.log", "b.log", "c.journal", f"journal:{tmp_path}/d"):
        assert isinstance(open_storage(text), optuna.storages.JournalStorage)
    for memory in (None, "sqlite://", "sqlite:///:memory:"):
        assert isinstance(open_storage(memory), optuna.storages.InMemoryStorage)
    own = optuna.storages.InMemoryStorage()
    assert open_storage(own) is own
    assert {p.name for p in tmp_path.iterdir() if p.name[0] != "." and "-" not in p.name} == {
        *("a.db", "b.db", "c.sqlite", "d.db", "a.log", "b.log", "c.journal", "d")
    }


def test_names_for_messages(tmp_path: Path) -> None:
    assert storage_name(open_storage(f"sqlite:///{tmp_path}/a.db")) == repr(f"{tmp_path}/a.db")
    assert storage_name(open_storage(f"journal:{tmp_path}/a.log")) == repr(f"{tmp_path}/a.log")
    assert storage_name(open_storage(None)) == "in memory"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study", "must be sqlite:///FILE.db, journal:FILE"),
        ("", "must be sqlite:///FILE.db, journal:FILE"),
        ("journal:", "is no file"),
        ("redis://localhost/0", "unknown kind"),
        ("sqlite:///none/study.db", "there is no folder '.*/none'; make it first"),
        ("journal:none/study.log", "there is no folder '.*/none'; make it first"),
        ("sqlite:///file:study.db?uri=true", "must be sqlite:///FILE.db"),
        ("postgresql:hidden@host/db", "must be .*; got a text with an @"),
        ("postgresql://me:hidden@host:port/db", "postgresql://… is no URL"),
        ("postgresql://me:hid@den@host/db", "more than one @.*%40"),
        ("oracle+nothing://me:hidden@host/db", "unknown kind"),
        ("mssql+pymssql://me:hidden@host/db", "needs a driver: pip install pymssql"),
    ],
)
def test_what_is_no_storage(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match=message) as caught:
        open_storage(text)
    assert "hid" not in "".join(traceback.format_exception(caught.value))
    assert not list(tmp_path.iterdir())


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r"pip install 'ranknas\[postgresql\]'"):
        open_storage("postgresql://me@host/db")


def test_what_must_exist_is_not_made(tmp_path: Path) -> None:
    for text in (f"sqlite:///{tmp_path}/a.db", f"journal:{tmp_path}/a.log"):
        with pytest.raises(StudyError, match="does not exist"):
            study_names(text)
        Path(text.partition(":")[2].replace("///", "")).touch()
        with pytest.raises(StudyError, match="is empty"):
            open_storage(text, create=False)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StudyError, match="is no file"):
        open_storage(f"sqlite:///{tmp_path}/folder")


# --------------------------------------------------------------------------- databases


def test_sqlite_writes_ahead_and_to_disk(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/study.db")
    with storage.engine.connect() as connection:  # type: ignore[attr-defined]
        found = [
            connection.execute(sqlalchemy.text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout")
        ]
    assert found == ["wal", 2, 60_000]


@pytest.mark.parametrize("text", ["this is no database", "\0"])
def test_garbage_is_no_database(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.db").write_text(text * 1000)
    with pytest.raises(StudyError, match=r"'.*study\.db' cannot be used, it is damaged") as caught:
        opened(f"sqlite:///{tmp_path}/study.db")
    assert "Bring it back from a copy" in str(caught.value)


def test_a_truncated_database_is_refused(
    tmp_path: Path, database: tuple[bytes, tuple[Trial, ...]]
) -> None:
    content, _ = database
    path = tmp_path / "study.db"
    drawn = random.Random(0)
    cuts = [1, 50, 100, 4096, 8192, len(content) - 4096, len(content) - 1]
    for cut in [*cuts, *(drawn.randrange(1, len(content)) for _ in range(30))]:
        path.write_bytes(content[:cut])
        with pytest.raises(StudyError, match=r"study\.db' cannot be used, it is damaged"):
            opened(f"sqlite:///{path}")


def test_a_database_with_garbage_in_it_never_gives_wrong_trials(
    tmp_path: Path, database: tuple[bytes, tuple[Trial, ...]]
) -> None:
    content, trials = database
    drawn = random.Random(0)
    refused = 0
    for i in range(25):
        path = tmp_path / f"study{i}.db"
        spoilt = bytearray(content)
        start = drawn.randrange(len(content) - 200)
        spoilt[start : start + 200] = drawn.randbytes(200)
        path.write_bytes(spoilt)
        try:
            assert opened(f"sqlite:///{path}").history().trials == trials
        except StudyError as error:
            refused += 1
            assert path.name in str(error) or "another configuration" in str(error)
    assert refused >= 5  # the rest is in pages that are free, or in spare room


def test_a_changed_number_is_found(
    tmp_path: Path, database: tuple[bytes, tuple[Trial, ...]]
) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(database[0])
    connection = sqlite3.connect(path)
    connection.execute("UPDATE trial_values SET value = value + 0.001 WHERE trial_id = 4")
    connection.commit()
    connection.close()
    with pytest.raises(StudyError, match=r"trial 3 .*study\.db' is damaged: it is not what"):
        opened(f"sqlite:///{path}").history()


# ---------------------------------------------------------------------------- journals


def test_a_journal_cut_anywhere_keeps_its_whole_lines(
    tmp_path: Path,
    journal: tuple[bytes, tuple[Trial, ...]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As after a kill in the middle of a line: what was finished is there, and it can go on."""
    content, trials = journal
    drawn = random.Random(0)
    configured = content.index(b"ranknas:configuration")
    start = content.index(b"\n", configured) + 1
    for i, cut in enumerate(sorted(drawn.randrange(start, len(content)) for _ in range(40))):
        path = tmp_path / f"study{i}.log"
        path.write_bytes(content[:cut])
        caplog.clear()
        store = opened(f"journal:{path}")
        found = store.history().trials
        assert found == trials[: len(found)]
        whole = content[: content.rfind(b"\n", 0, cut) + 1]
        assert len(found) == whole.count(b'{"op_code":4,')
        assert (str(path) in caplog.text) == (content[cut - 1] != 10)
        store.add(evaluated(Claim(ALLOCATIONS[20], TARGET)), ("accuracy",))
        again = opened(f"journal:{path}").history().trials
        assert again[:-1] == found and again[-1].allocation == ALLOCATIONS[20]


def test_a_line_cut_off_while_we_work_is_taken_away(tmp_path: Path) -> None:
    """Another process is killed in the middle of a line; Optuna would append to it."""
    path = tmp_path / "study.log"
    store = opened(f"journal:{path}")
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x","study_id":0,"sta')
    store.add(evaluated(Claim(ALLOCATIONS[0], TARGET)), ("accuracy",))
    assert len(opened(f"journal:{path}").history().trials) == 1
    assert path.read_bytes().endswith(b"\n")


def test_a_garbage_line_of_a_journal_is_named(
    tmp_path: Path, journal: tuple[bytes, tuple[Trial, ...]]
) -> None:
    lines = journal[0].splitlines(keepends=True)
    path = tmp_path / "study.log"
    for garbage in (
        b"\xff\xfe\x00\n",
        b"{}\n",
        b"[1]\n",
        b'{"op_code":"4","worker_id":"x"}\n',
        b"\n",
    ):
        path.write_bytes(b"".join([*lines[:5], garbage, *lines[5:]]))
        with pytest.raises(StudyError, match=r"study\.log' cannot be used.*line 6 is no line"):
            opened(f"journal:{path}")
        assert path.read_bytes() == b"".join([*lines[:5], garbage, *lines[5:]])


def test_a_journal_that_tells_no_story_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    path.write_text('{"op_code":4,"worker_id":"x"}\n')
    with pytest.raises(StudyError, match=r"study\.log' cannot be used, it is damaged"):
        open_storage(f"journal:{path}")


@pytest.mark.parametrize("content", [b"no journal at all", b"\0" * 5000, b"{}", b"no\njournal"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "study.log"
    path.write_bytes(content)
    with pytest.raises(StudyError, match="line 1 is no line of a journal"):
        open_storage(f"journal:{path}")
    assert path.read_bytes() == content


def test_a_journal_with_garbage_in_it_never_gives_wrong_trials(
    tmp_path: Path, journal: tuple[bytes, tuple[Trial, ...]]
) -> None:
    content, trials = journal
    drawn = random.Random(0)
    for i in range(100):
        path = tmp_path / f"study{i}.log"
        spoilt = bytearray(content)
        start = drawn.randrange(len(content) - 20)
        spoilt[start : start + 20] = drawn.randbytes(20)
        path.write_bytes(spoilt)
        with pytest.raises(StudyError):
            opened(f"journal:{path}").history()


def test_a_line_damaged_while_we_work_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    store = opened(f"journal:{path}")
    with path.open("ab") as file:
        file.write(b"garbage\n" * 2)
    with pytest.raises(StudyError, match=r"study\.log' cannot be used"):
        store.history()


# --------------------------------------------------------------------------- passwords


def failures(postgres: Cluster) -> dict[str, str]:
    """URLs with a password that do not work."""
    good = postgres.url()
    return {
        "wrong password": postgres.url(password="not-it-at-all"),
        "nobody listens": good.replace(str(postgres.port), str(free_port())),
        "unreachable host": good.replace("127.0.0.1", "nowhere.invalid"),
        "no such database": postgres.url("nothing"),
        "bad option": f"{good}?sslmode=what",
    }


@pytest.mark.parametrize(
    "kind",
    ["wrong password", "nobody listens", "unreachable host", "no such database", "bad option"],
)
def test_no_password_in_errors_or_logs(
    kind: str, postgres: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    url = failures(postgres)[kind]
    with caplog.at_level(logging.DEBUG), pytest.raises(StudyError) as caught:
        opened(url)
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "postgresql+psycopg://ranknas:***@" in str(caught.value)
    for secret in (PASSWORD, "not-it-at-all", url.split("@")[0].rpartition(":")[2]):
        assert secret not in shown


def test_the_password_may_be_in_the_environment(
    postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.new_database().replace(
        postgres.url("").partition("@")[0], "postgresql://ranknas"
    )
    assert "%" not in url
    monkeypatch.delenv(module.PASSWORD, raising=False)
    monkeypatch.setenv("PGPASSFILE", os.devnull)
    with pytest.raises(StudyError, match="password"):
        open_storage(url)
    monkeypatch.setenv(module.PASSWORD, PASSWORD)
    filled(url, 1)
    assert study_names(url) == ["name"]
    monkeypatch.delenv(module.PASSWORD)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert study_names(url) == ["name"]


def test_two_drivers(postgres: Cluster) -> None:
    url = postgres.new_database()
    assert filled(url.replace("postgresql:", "postgres:"), 2)
    assert study_names(url.replace("postgresql:", "postgresql+psycopg:")) == ["name"]


@pytest.mark.parametrize(
    ("error", "statement", "message"),
    [
        (sqlalchemy.exc.OperationalError, "CREATE TABLE studies", "table already exists"),
        (
            sqlalchemy.exc.IntegrityError,
            "INSERT INTO alembic_version",
            "UNIQUE constraint failed: alembic_version.version_num",
        ),
        (
            sqlalchemy.exc.IntegrityError,
            "CREATE TABLE studies",
            'duplicate key value violates unique constraint "pg_type_typname_nsp_index"',
        ),
    ],
)
def test_tables_that_another_program_makes_at_the_same_moment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[sqlalchemy.exc.DBAPIError],
    statement: str,
    message: str,
) -> None:
    """As a dashboard may, which knows nothing of our lock."""
    made, begun = module.RDBStorage, []

    def racing(*arguments: Any, **options: Any) -> Any:
        begun.append(1)
        if len(begun) == 1:
            made(*arguments, **options)
            raise error(statement, {}, Exception(message))
        return made(*arguments, **options)

    monkeypatch.setattr(module, "RDBStorage", racing)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    opened = open_storage(f"sqlite:///{tmp_path}/study.db")
    assert len(begun) == 2 and optuna.get_all_study_names(opened) == []
