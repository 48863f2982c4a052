"""lowlat compare: clean pairs are equal, planted mistakes are named."""
