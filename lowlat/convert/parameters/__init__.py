"""Parameters of a converted model: exact MLA, sparse upcycling, shared RoPE."""
