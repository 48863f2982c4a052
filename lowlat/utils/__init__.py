"""Helpers for every layer: atomic files, locks, progress, strict JSON, memory."""
