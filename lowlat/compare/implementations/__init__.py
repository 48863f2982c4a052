"""Implementations of a model that `lowlat compare` runs and records, and how a name selects one."""
