"""Measures lowlat and other programs on the same weights, in turn, against the machine's limits."""
