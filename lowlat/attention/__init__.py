"""The paged cache of rows and the backends that attend over it."""
