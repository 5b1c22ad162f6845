"""Whom content is about, so that erasing finds it with encryption off as well."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go forward."""
    op.add_column("blob", sa.Column("subject", sa.String(), nullable=True))
    op.create_index("blob_by_subject", "blob", ["tenant", "subject"])


def downgrade() -> None:
    """Go back."""
    op.drop_index("blob_by_subject", "blob")
    with op.batch_alter_table("blob") as batch:
        batch.drop_column("subject")
