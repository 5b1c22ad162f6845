"""One file per agent: a SPEC and its workflow."""
