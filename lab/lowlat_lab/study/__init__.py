"""Ablation studies: small training runs that differ in one factor, compared over seeds."""
