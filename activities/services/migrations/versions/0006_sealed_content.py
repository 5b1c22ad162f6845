"""Data keys, and which of them a blob is sealed under."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Go forward."""
    op.create_table(
        "subject_key",
        sa.Column("tenant", sa.String(), primary_key=True),
        sa.Column("subject_key_id", sa.String(), primary_key=True),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        sa.Column("wrapped_by", sa.String(), nullable=False),
        sa.Column("destroyed_at", BIG, nullable=True),
    )
    op.add_column("blob", sa.Column("sealed_by", sa.String(), nullable=True))


def downgrade() -> None:
    """Go back; what is sealed cannot be read by what was before."""
    with op.batch_alter_table("blob") as batch:
        batch.drop_column("sealed_by")
    op.drop_table("subject_key")
