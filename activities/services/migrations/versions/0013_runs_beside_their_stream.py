"""Events in a run's own stream are found by the stream; the index by run is for the others alone.

Each index that an event stands in costs an append a page of the write-ahead log, and each flush its bytes.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

NAME = "event_by_correlation"
COLUMNS = ["log_id", "correlation_id", "seq"]
ELSEWHERE = sa.text("correlation_id <> stream")


def upgrade() -> None:
    """Go forward."""
    op.drop_index(NAME, "event")
    op.create_index(NAME, "event", COLUMNS, sqlite_where=ELSEWHERE, postgresql_where=ELSEWHERE)


def downgrade() -> None:
    """Go back."""
    op.drop_index(NAME, "event")
    op.create_index(NAME, "event", COLUMNS)
