"""Installs, starts and stops real target systems."""
