"""Turning one checkpoint into another: attention form, number type, file format."""
