"""Snapshots, from when on events can be dropped."""

import sqlalchemy as sql
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds their table."""
    op.create_table(
        "snapshots",
        sql.Column(
            "sequence",
            sql.BigInteger().with_variant(sql.Integer, "sqlite"),
            primary_key=True,
            autoincrement=False,
        ),
        sql.Column("now_s", sql.Float(53), nullable=False),
        sql.Column("num_entries", sql.BigInteger, nullable=False),
        sql.Column("digest", sql.String, nullable=False),
        sql.Column("state", sql.LargeBinary, nullable=False),
    )
