"""Kills at every boundary."""
