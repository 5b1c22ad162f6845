"""Lines by which others vouch for checkpoints; as the checkpoints themselves, only ever added."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLE = "cosignature"


def upgrade() -> None:
    """Go forward."""
    op.create_table(
        TABLE,
        sa.Column("log_id", sa.String(), nullable=False),
        sa.Column("size", BIG, nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("line", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("log_id", "size", "key_id"),
    )
    for event in ("update", "delete"):
        rest = f"BEGIN SELECT RAISE(ABORT, '{TABLE}: rows of the ledger are only ever added'); END"
        if _is_postgres():
            rest = "FOR EACH ROW EXECUTE FUNCTION countersign_refuse()"
        op.execute(f"CREATE TRIGGER {TABLE}_no_{event} BEFORE {event.upper()} ON {TABLE} {rest}")
    if _is_postgres():
        op.execute(
            f"CREATE TRIGGER {TABLE}_no_truncate BEFORE TRUNCATE ON {TABLE} "
            "FOR EACH STATEMENT EXECUTE FUNCTION countersign_refuse()"
        )


def downgrade() -> None:
    """Go back; the triggers go with their table."""
    op.drop_table(TABLE)


def _is_postgres() -> bool:
    return op.get_bind().dialect.name == "postgresql"
