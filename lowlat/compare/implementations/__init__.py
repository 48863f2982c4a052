"""Implementations that `lowlat compare` runs and records, and their selection by name."""
