"""Data and the pure rules over it: no I/O, no clock."""
