"""Ablation studies, training corpora and result pages of lowlat."""
