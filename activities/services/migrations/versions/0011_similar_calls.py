"""Where the texts of answered calls lie, and how often the answers to similar ones were the same."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Go forward."""
    op.create_table(
        "similar_entry",
        sa.Column("tenant", sa.String(), primary_key=True),
        sa.Column("key", sa.String(), primary_key=True),
        *(sa.Column(name, sa.String(), nullable=False) for name in ("shape", "gist", "inputs", "vectors")),
        sa.Column("expires_at", BIG, nullable=False),
    )
    op.create_index("similar_by_shape", "similar_entry", ["tenant", "shape"])
    op.create_table(
        "similar_tally",
        sa.Column("tenant", sa.String(), primary_key=True),
        sa.Column("line", sa.String(), primary_key=True),
        sa.Column("edge", sa.Integer(), primary_key=True, autoincrement=False),
        *(sa.Column(name, BIG, nullable=False) for name in ("rights", "wrongs")),
    )


def downgrade() -> None:
    """Go back."""
    op.drop_table("similar_tally")
    op.drop_index("similar_by_shape", "similar_entry")
    op.drop_table("similar_entry")
