"""Studies: small trainings that differ in one thing, and what their difference comes to."""
