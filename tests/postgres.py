"""A throw-away PostgreSQL server that really asks for a password."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

PASSWORD = "pa:ss@w/o%rd{1}"
USER = "ranknas"


class Cluster:
    """A server in a folder of its own, on a free port of this computer."""

    def __init__(self, programs: Path) -> None:
        self.programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="ranknas-postgres-"))
        self.data = self.folder / "data"
        self.port = free_port()
        self.databases = 0
        # PostgreSQL refuses to run as root.
        self.user: dict[str, Any] = {}
        if os.getuid() == 0:
            names = [entry.pw_name for entry in pwd.getpwall()]
            name = "postgres" if "postgres" in names else "nobody"
            self.user = {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []}
            shutil.chown(self.folder, name)
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        options = ["-U", USER, "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync"]
        self.program("initdb", "-D", self.data, *options, "-E", "UTF8", "--locale=C")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(
                f"port = {self.port}\nlisten_addresses = '127.0.0.1'\n"
                "unix_socket_directories = ''\nshared_buffers = 16MB\nfsync = off\n"
            )
        self.start()

    def program(self, name: str, *arguments: object) -> None:
        subprocess.run(
            [self.programs / name, *map(str, arguments)],
            check=True,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
            **self.user,
        )

    def start(self) -> None:
        log = self.folder / "log"
        self.program("pg_ctl", "start", "-w", "-D", self.data, "-l", log)

    def stop(self, mode: str = "immediate") -> None:
        """Stop; ``immediate`` as if it were killed."""
        self.program("pg_ctl", "stop", "-w", "-D", self.data, "-m", mode)

    def url(self, database: str = "postgres", password: str | None = PASSWORD) -> str:
        """The URL of a database, with a password or without."""
        login = USER if password is None else f"{USER}:{quote(password, safe='')}"
        return f"postgresql://{login}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        import psycopg

        self.databases += 1
        name = f"test{self.databases}"
        login = {"host": "127.0.0.1", "port": self.port, "user": USER, "password": PASSWORD}
        for _ in range(50):  # a test may have stopped the server a moment ago
            try:
                with psycopg.connect(**login, dbname="postgres", autocommit=True) as connection:
                    connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
                return self.url(name)
            except psycopg.OperationalError:
                time.sleep(0.1)
        raise TimeoutError("PostgreSQL does not answer")

    def remove(self) -> None:
        """Stop and delete."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def programs() -> Path | None:
    """The folder of PostgreSQL's server programs, which Debian leaves out of PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found := shutil.which("initdb"):
        folders.append(Path(found).parent)
    return next((f for f in folders if (f / "initdb").exists() and (f / "pg_ctl").exists()), None)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
