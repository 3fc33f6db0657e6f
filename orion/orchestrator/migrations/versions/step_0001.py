"""Events and the header of a run: all that a journal was before it had snapshots."""

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """From nothing."""
    sequence = sql.BigInteger().with_variant(sql.Integer, "sqlite")
    op.create_table(
        "header",
        sql.Column("id", sql.Integer, primary_key=True),
        sql.Column("format_version", sql.Integer, nullable=False),
        sql.Column("run_digest", sql.String, nullable=False),
        sql.Column("secret", sql.LargeBinary, nullable=False),
    )
    op.create_table(
        "events",
        sql.Column("sequence", sequence, primary_key=True, autoincrement=False),
        sql.Column("now_s", sql.Float(53), nullable=False),
        sql.Column("event", sql.LargeBinary, nullable=False),
    )
