"""Pages of docs/results that are filled from recorded benchmark figures."""
