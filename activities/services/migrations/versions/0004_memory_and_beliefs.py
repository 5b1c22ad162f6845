"""The memory contract, its index of words, beliefs, leases."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from activities.services.words import make_words, put_words

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
NEVER = str(2**53 - 1)
DAY = 86_400_000_000
LIVE = {"idea": 180, "outcome": 30}
"""Lifetimes in days of the kinds that were there before."""
BACKFILL = sa.text(
    "SELECT m.position, m.tenant, m.title, b.data FROM memory m JOIN blob b "
    "ON b.tenant = m.tenant AND b.digest = m.text_digest WHERE m.forgotten_at IS NULL"
)


def upgrade() -> None:
    """Go forward."""
    with op.batch_alter_table("memory") as batch:
        for name in ("agent", "subject", "why", "source_event"):
            batch.add_column(sa.Column(name, sa.String(), nullable=False, server_default=""))
        for name, value in (("derived_from", "[]"), ("origin", "tool"), ("standing", "active")):
            batch.add_column(sa.Column(name, sa.String(), nullable=False, server_default=value))
        batch.add_column(sa.Column("confidence_percent", sa.Integer(), nullable=True))
        for name, value in (
            ("active_at", "0"),
            ("valid_from", "0"),
            ("valid_to", NEVER),
            ("expires_at", NEVER),
        ):
            batch.add_column(sa.Column(name, BIG, nullable=False, server_default=value))
        batch.create_index("memory_by_subject", ["tenant", "subject"])
        batch.create_index("memory_by_expiry", ["standing", "expires_at"])
    _tables()
    _backfill(op.get_bind())


def _tables() -> None:
    text, whole = sa.String, sa.Integer
    _create("memory_support", "tenant record_id event_id", basis=text, seen_at=BIG)
    _create("given_text", "tenant run digest", given_at=BIG)
    op.create_index("ix_given_text_given_at", "given_text", ["given_at"])
    _create("merge_proposal", "tenant first second", cosine_permille=whole, proposed_at=BIG)
    _create("index_cursor", "store model", position=BIG)
    _create("belief_head", "tenant agent subject", version=whole, epoch=whole, holder=text)
    op.create_table(
        "belief_snapshot",
        *(sa.Column(name, text(), primary_key=True) for name in ("tenant", "agent", "subject")),
        sa.Column("version", whole(), primary_key=True),
        sa.Column("event_id", text(), nullable=False),
        sa.Column("epoch", whole(), nullable=False),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.Column("digest", text(), nullable=False),
        sa.Column("recorded_at", BIG, nullable=False),
        sa.UniqueConstraint("tenant", "agent", "subject", "event_id"),
    )
    _create("lease", "name", holder=text, epoch=whole, expires_at=BIG)


def _create(name: str, keys: str, **columns: Any) -> None:
    op.create_table(
        name,
        *(sa.Column(key, sa.String(), primary_key=True) for key in keys.split()),
        *(sa.Column(column, kind, nullable=False) for column, kind in columns.items()),
    )


def _backfill(connection: sa.Connection) -> None:
    connection.execute(sa.text("UPDATE memory SET source_event = source, active_at = recorded_at"))
    for kind, days in LIVE.items():
        expiry = sa.text("UPDATE memory SET expires_at = recorded_at + :lifetime WHERE kind = :kind")
        connection.execute(expiry, {"lifetime": days * DAY, "kind": kind})
    make_words(connection)
    for position, tenant, title, data in connection.execute(BACKFILL).all():
        text = bytes(data).decode(errors="replace").replace("\0", " ")
        put_words(connection, position, f"{title}\n{text}", tenant)


def downgrade() -> None:
    """Go back."""
    for name in ("memory_vocabulary", "memory_words"):
        op.execute(f"DROP TABLE IF EXISTS {name}")
    names = ("lease", "belief_snapshot", "belief_head", "index_cursor", "merge_proposal", "given_text")
    for name in (*names, "memory_support"):
        op.drop_table(name)
    with op.batch_alter_table("memory") as batch:
        batch.drop_index("memory_by_expiry")
        batch.drop_index("memory_by_subject")
        for name in ("agent", "subject", "why", "source_event", "derived_from", "origin", "standing"):
            batch.drop_column(name)
        for name in ("confidence_percent", "active_at", "valid_from", "valid_to", "expires_at"):
            batch.drop_column(name)
