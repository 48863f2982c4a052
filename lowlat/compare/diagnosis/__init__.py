"""Diagnose a difference: recompute recorded steps with known mistakes injected, name the match."""
