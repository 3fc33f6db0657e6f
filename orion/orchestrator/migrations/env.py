"""Run by Alembic: applies the steps on the connection that it is given, within the transaction that is open on it."""

from alembic import context

from orion.orchestrator.journal_tables import METADATA
from orion.orchestrator.migrate import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
