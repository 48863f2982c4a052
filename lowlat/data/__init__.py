"""Training data: read documents, write tokenized datasets, pack sequences."""
