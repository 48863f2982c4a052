"""Compare two implementations of a model: find the first difference, its size and its cause."""
