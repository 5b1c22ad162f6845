"""Measurements: each prints JSON and runs its floor beside it."""
