"""Model names, downloads from package indexes and the hub, and the cache folder."""
