"""Brings a journal's tables to what this version needs.

An upgrade is wholly done or not at all. Journals that were written before there were migrations are known by their
tables; whatever else lies in a database is left alone and refused.
"""

import sqlalchemy as sql

from orion.common.errors import ConfigError

VERSION_TABLE = "journal_version"
NEWEST = "0002"
"""The last step of `migrations`; a test holds the two together."""
_UNVERSIONED = "0001"
_TABLES = frozenset({"header", "events"})


def migrate(connection: sql.Connection, name: str) -> None:
    """Applies the steps that are missing. Raises ConfigError for a newer journal, and for what is none.

    The connection must hold the right to write.
    """
    with connection.begin():
        version = version_of(connection)
        if version == NEWEST:
            return
        # Here, because a journal that needs no upgrade needs none of this either.
        from alembic import command  # noqa: PLC0415
        from alembic.config import Config  # noqa: PLC0415
        from alembic.util import CommandError  # noqa: PLC0415

        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", "orion.orchestrator:migrations")
        config.set_main_option("path_separator", "os")
        try:
            if version is None and _is_unversioned(connection, name):
                command.stamp(config, _UNVERSIONED)
            command.upgrade(config, "head")
        except CommandError as error:
            raise ConfigError(
                f"journal {name} was written by another version ({version}, this one knows up to {NEWEST}): {error}; "
                "use that version"
            ) from error


def version_of(connection: sql.Connection) -> str | None:
    """The step that the tables are at; None where there is no note of one."""
    if not sql.inspect(connection).has_table(VERSION_TABLE):
        return None
    version: str | None = connection.scalar(sql.text(f"SELECT version_num FROM {VERSION_TABLE}"))
    return version


def _is_unversioned(connection: sql.Connection, name: str) -> bool:
    """Whether there is a journal without a note of its version; False: there is nothing yet."""
    found = set(sql.inspect(connection).get_table_names())
    is_file = connection.dialect.name == "sqlite"
    if is_file and found == _TABLES:
        return True
    if found if is_file else found & (_TABLES | {"snapshots"}):
        raise ConfigError(f"{name} holds something else than a journal: use another file, database or schema")
    return False
