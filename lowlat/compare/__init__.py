"""Compare two implementations of a model: the first difference, its size, its cause."""
