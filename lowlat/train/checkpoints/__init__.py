"""Saves of a run: its folder and lock, complete states written atomically, checked when read."""
