"""Each tenant's words spelled in its own way."""

from __future__ import annotations

import re

import sqlalchemy as sa
from alembic import op

from activities.services.words import drop_words, folded, mark_of, put_spelled

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

INDEXED = {
    "sqlite": "SELECT w.rowid, m.tenant, w.words FROM memory_words w JOIN memory m ON m.position = w.rowid",
    "postgresql": "SELECT w.position, m.tenant, array_to_string(tsvector_to_array(w.words), ' ') "
    "FROM memory_words w JOIN memory m ON m.position = w.position",
}
"""The index is read, not the texts: some of them are sealed, or in a region of their own."""
HASHED = re.compile(r"x[0-9a-f]{20}")
"""A word that was indexed with encryption on, which is spelled by a key of its tenant already."""


def upgrade() -> None:
    """Go forward."""
    link = op.get_bind()
    for position, tenant, words in link.execute(sa.text(INDEXED[link.dialect.name])).all():
        each, mark = re.findall(r"\w+", folded(words)), mark_of(tenant)
        if any(not HASHED.fullmatch(word) and not word.startswith(mark) for word in each):
            drop_words(link, position)
            put_spelled(link, position, [f"{mark}{word}" for word in each])


def downgrade() -> None:
    """Go back."""
    link = op.get_bind()
    for position, tenant, words in link.execute(sa.text(INDEXED[link.dialect.name])).all():
        drop_words(link, position)
        put_spelled(link, position, [word.removeprefix(mark_of(tenant)) for word in words.split()])
