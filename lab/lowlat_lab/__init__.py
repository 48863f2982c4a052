"""Studies, corpora and result pages of lowlat."""
