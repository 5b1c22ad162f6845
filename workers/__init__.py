"""Processes and their composition."""
