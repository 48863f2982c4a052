"""The transformer's modules: one file per idea. No file format, no cache layout, no sharding."""
