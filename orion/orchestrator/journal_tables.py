"""The journal's tables, as the newest migration leaves them."""

import sqlalchemy as sql

METADATA = sql.MetaData()

_SEQUENCE = sql.BigInteger().with_variant(sql.Integer, "sqlite")
"""SQLite keeps rows in the order of a key only if it is declared so."""

HEADER = sql.Table(
    "header",
    METADATA,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("format_version", sql.Integer, nullable=False),
    sql.Column("run_digest", sql.String, nullable=False),
    sql.Column("secret", sql.LargeBinary, nullable=False),
)
EVENTS = sql.Table(
    "events",
    METADATA,
    sql.Column("sequence", _SEQUENCE, primary_key=True, autoincrement=False),
    sql.Column("now_s", sql.Float(53), nullable=False),
    sql.Column("event", sql.LargeBinary, nullable=False),
)
SNAPSHOTS = sql.Table(
    "snapshots",
    METADATA,
    sql.Column("sequence", _SEQUENCE, primary_key=True, autoincrement=False),
    sql.Column("now_s", sql.Float(53), nullable=False),
    sql.Column("num_entries", sql.BigInteger, nullable=False),
    sql.Column("digest", sql.String, nullable=False),
    sql.Column("state", sql.LargeBinary, nullable=False),
)
