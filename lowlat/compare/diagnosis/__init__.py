"""Diagnosis of a difference: recompute recorded steps with known mistakes and find the match."""
