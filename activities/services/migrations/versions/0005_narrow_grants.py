"""How often each narrow grant was used."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go forward."""
    op.create_table(
        "grant_use",
        *(sa.Column(name, sa.String(), primary_key=True) for name in ("tenant", "agent", "name")),
        sa.Column("used", sa.Integer(), nullable=False),
    )


def downgrade() -> None:
    """Go back."""
    op.drop_table("grant_use")
