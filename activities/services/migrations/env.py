"""Alembic's entry point: runs inside the connection that `migrate` gives it."""

from __future__ import annotations

from alembic import context

from models import tables

context.configure(
    connection=context.config.attributes["connection"],
    # Importing the tables is what fills it.
    target_metadata=tables.SQLModel.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
