"""Training text out of the packages that ship it. Owns no tokens (`train.data`)."""
