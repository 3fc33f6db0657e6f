"""Addresses of databases, and engines for them: SQLite files and PostgreSQL."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import sqlalchemy as sql

from orion.common.errors import ConfigError

_BUSY_S = 10.0
"""What a writer waits for another one of the same file."""
_CONNECT_S = 10


def parse_address(address: str) -> sql.URL:
    """The database that an address means: `sqlite:///PATH` or `postgresql://USER@HOST/NAME`.

    Raises ConfigError for anything else, and where the driver is missing.
    """
    try:
        url = sql.make_url(address)
    except sql.exc.ArgumentError:
        raise ConfigError("a journal's address is sqlite:///PATH or postgresql://USER@HOST/NAME") from None
    match url.get_backend_name():
        case "sqlite" if url.database:
            return url.set(drivername="sqlite+pysqlite")
        case "postgresql" if url.database:
            if find_spec("psycopg") is None:
                raise ConfigError("PostgreSQL needs a driver: pip install 'orion-swarm[postgres]'")
            return url.set(drivername="postgresql+psycopg")
        case name:
            raise ConfigError(
                f"no journal can be kept in {name!r}: its address is sqlite:///PATH or postgresql://USER@HOST/NAME"
            )


def shown(address: str) -> str:
    """An address as people may see it: without a password."""
    return parse_address(address).render_as_string(hide_password=True)


def sqlite_path(url: sql.URL) -> Path | None:
    """The file of an SQLite database; None for PostgreSQL."""
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def make_engine(url: sql.URL, sqlite_pragmas: Mapping[str, str]) -> sql.Engine:
    """An engine whose transactions begin when they are said to, also for reading and for changes of tables."""
    if sqlite_path(url) is None:
        return sql.create_engine(url, connect_args={"connect_timeout": _CONNECT_S})
    # Calls come one at a time, but not always from one thread.
    engine = sql.create_engine(url, connect_args={"check_same_thread": False, "timeout": _BUSY_S})

    @sql.event.listens_for(engine, "connect")
    def _set_up(connection: object, _: object) -> None:
        connection.isolation_level = None  # type: ignore[attr-defined]
        cursor = connection.cursor()  # type: ignore[attr-defined]
        for name, value in sqlite_pragmas.items():
            cursor.execute(f"PRAGMA {name} = {value}")
        cursor.close()

    @sql.event.listens_for(engine, "begin")
    def _begin(connection: sql.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine
