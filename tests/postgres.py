"""A real PostgreSQL server for tests: in a folder of its own, through a socket there, as a user without rights."""

import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

START_S = 60.0
SUPERUSER = "postgres"
PROGRAMS = ("/usr/lib/postgresql", "/usr/local/opt/postgresql/bin", "/opt/homebrew/opt/postgresql/bin")
"""Where packages put them; Debian's lie below a folder for each version."""


class PostgresServer:
    """Where it listens; every address is of a new, empty database."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)

    def address(self) -> str:
        name = f"test_{os.getpid()}_{next(self._numbers)}"
        with psycopg.connect(self._conninfo("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return f"postgresql://{SUPERUSER}@/{name}?host={self._folder}"

    def wait(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        """Until it takes connections."""
        until_s = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(self._conninfo("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                assert process.poll() is None, f"PostgreSQL did not start: {log.read_text()}"
                assert time.monotonic() < until_s, f"PostgreSQL does not answer: {log.read_text()}"
                time.sleep(0.05)

    def _conninfo(self, database: str) -> str:
        return f"host={self._folder} user={SUPERUSER} dbname={database}"


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Runs a server; it is stopped when the block is left."""
    initdb, postgres = _program("initdb"), _program("postgres")
    # Not below pytest's folder: the server's user could not enter it, and a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="orion-postgres-"))
    user = SUPERUSER if os.geteuid() == 0 else None  # it refuses to run as root
    try:
        if user is not None:
            shutil.chown(folder, user)
        # What it keeps need not outlive the machine here, so nothing is synced.
        options = ["-D", "data", "-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run([initdb, *options], cwd=folder, user=user, capture_output=True, text=True, check=False)
        assert made.returncode == 0, f"initdb: {made.stderr}"
        settings = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [postgres, "-D", "data", *settings], cwd=folder, user=user, stdout=log, stderr=log
            )
        try:
            server = PostgresServer(folder)
            server.wait(process, folder / "log")
            yield server
        finally:
            process.terminate()
            process.wait()
    finally:
        shutil.rmtree(folder)


def _program(name: str) -> str:
    places = [os.environ.get("PATH", "")]
    for place in map(Path, PROGRAMS):
        versions = sorted((path for path in place.glob("*/bin")), key=lambda path: path.parent.name, reverse=True)
        places += map(str, (*versions, place))
    found = shutil.which(name, path=os.pathsep.join(places))
    assert found is not None, (
        f"PostgreSQL's {name} is missing, which tests of the journal start: apt-get install postgresql, "
        "or scripts/postgres.sh as root"
    )
    return found
