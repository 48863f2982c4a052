"""Tests of lowlat/train/data."""
