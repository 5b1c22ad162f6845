"""The Temporal surface of everything that touches the world."""
