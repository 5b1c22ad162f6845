"""How often short-term caches had the answer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Go forward."""
    op.create_table(
        "short_term_use",
        sa.Column("day", sa.Integer(), primary_key=True, autoincrement=False),
        *(sa.Column(name, BIG, nullable=False) for name in ("hits", "misses", "warmed")),
    )


def downgrade() -> None:
    """Go back."""
    op.drop_table("short_term_use")
