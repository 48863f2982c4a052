"""Corpus collection: training text from packages (pip, npm, Debian), with licences."""
