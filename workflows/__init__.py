"""Durable decisions: the loop, once, and what it is made of."""
