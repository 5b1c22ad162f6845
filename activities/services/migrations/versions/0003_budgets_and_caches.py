"""Budgets, the money held against them, cached answers, and what each model call cost."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Go forward."""
    op.create_table(
        "budget",
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("held", BIG, nullable=False),
        sa.Column("spent", BIG, nullable=False),
        sa.PrimaryKeyConstraint("account"),
    )
    op.create_table(
        "reservation",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("workflow_id", sa.String(), nullable=False),
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("accounts", sa.String(), nullable=False),
        sa.Column("currency", sa.String(), nullable=False),
        sa.Column("worst", BIG, nullable=False),
        sa.Column("spent", BIG, nullable=False),
        sa.Column("expires_at", BIG, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "id"),
    )
    op.create_index("ix_reservation_workflow_id", "reservation", ["workflow_id"])
    op.create_index("reservation_by_lease", "reservation", ["state", "expires_at"])
    op.create_table(
        "cache_entry",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("answered", sa.String(), nullable=False),
        sa.Column("expires_at", BIG, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "key"),
    )
    op.create_index("ix_cache_entry_expires_at", "cache_entry", ["expires_at"])
    with op.batch_alter_table("model_call") as table:
        table.add_column(sa.Column("usable", sa.Boolean(), nullable=False, server_default=sa.true()))
        table.add_column(sa.Column("tenant", sa.String(), nullable=False, server_default=""))
        table.add_column(sa.Column("reservation", sa.String(), nullable=True))
        table.add_column(sa.Column("micros", BIG, nullable=True))
        table.add_column(sa.Column("currency", sa.String(), nullable=True))
        table.create_index("ix_model_call_reservation", ["reservation"])


def downgrade() -> None:
    """Go back."""
    with op.batch_alter_table("model_call") as table:
        table.drop_index("ix_model_call_reservation")
        for column in ("currency", "micros", "reservation", "tenant", "usable"):
            table.drop_column(column)
    for name in ("cache_entry", "reservation", "budget"):
        op.drop_table(name)
