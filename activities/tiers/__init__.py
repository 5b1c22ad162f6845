"""One file per model server protocol."""
