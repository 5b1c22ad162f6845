"""The Merkle tree of each log, its checkpoints, and guards that let rows of the ledger only be added."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from activities.services.merkle import extend, pack

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
GUARDED = ("event", "merkle_node", "checkpoint")
REFUSE = """
CREATE FUNCTION countersign_refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION '%: rows of the ledger are only ever added', TG_TABLE_NAME; END $$
"""


def upgrade() -> None:
    """Go forward."""
    op.create_table(
        "merkle_node",
        sa.Column("log_id", sa.String(), nullable=False),
        sa.Column("level", sa.Integer(), nullable=False),
        sa.Column("idx", BIG, nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("log_id", "level", "idx"),
    )
    op.create_table(
        "checkpoint",
        sa.Column("log_id", sa.String(), nullable=False),
        sa.Column("size", BIG, nullable=False),
        sa.Column("root", sa.LargeBinary(), nullable=False),
        sa.Column("note", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("log_id", "size"),
    )
    empty = sa.text("''") if _is_postgres() else sa.text("x''")
    op.add_column("log_head", sa.Column("peaks", sa.LargeBinary(), nullable=False, server_default=empty))
    _plant()
    _guard()


def downgrade() -> None:
    """Go back."""
    for name in GUARDED:
        for event in ("update", "delete", "truncate") if _is_postgres() else ("update", "delete"):
            on = f" ON {name}" if _is_postgres() else ""
            op.execute(f"DROP TRIGGER {name}_no_{event}{on}")
    if _is_postgres():
        op.execute("DROP FUNCTION countersign_refuse()")
    op.drop_column("log_head", "peaks")
    op.drop_table("checkpoint")
    op.drop_table("merkle_node")


def _plant() -> None:
    """Grow the trees of logs that were there before there were trees."""
    link = op.get_bind()
    for log, size in link.execute(sa.text("SELECT log_id, size FROM log_head")).all():
        query = sa.text("SELECT leaf_hash FROM event WHERE log_id = :log ORDER BY seq")
        leaves = [bytes.fromhex(leaf) for leaf in link.execute(query, {"log": log}).scalars()]
        peaks, nodes = extend(0, [], leaves)
        if nodes:
            link.execute(
                sa.text(
                    "INSERT INTO merkle_node (log_id, level, idx, hash) VALUES (:log, :level, :idx, :hash)"
                ),
                [{"log": log, "level": n.level, "idx": n.index, "hash": n.hash} for n in nodes],
            )
        grown = sa.text("UPDATE log_head SET peaks = :peaks WHERE log_id = :log AND size = :size")
        link.execute(grown, {"log": log, "peaks": pack(peaks), "size": size})


def _guard() -> None:
    if _is_postgres():
        op.execute(REFUSE)
    for name in GUARDED:
        for event in ("update", "delete"):
            if _is_postgres():
                rest = "FOR EACH ROW EXECUTE FUNCTION countersign_refuse()"
            else:
                rest = f"BEGIN SELECT RAISE(ABORT, '{name}: rows of the ledger are only ever added'); END"
            op.execute(f"CREATE TRIGGER {name}_no_{event} BEFORE {event.upper()} ON {name} {rest}")
        if _is_postgres():
            op.execute(
                f"CREATE TRIGGER {name}_no_truncate BEFORE TRUNCATE ON {name} "
                "FOR EACH STATEMENT EXECUTE FUNCTION countersign_refuse()"
            )


def _is_postgres() -> bool:
    return op.get_bind().dialect.name == "postgresql"
