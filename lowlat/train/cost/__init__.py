"""Cost of a recipe on this machine: FLOPs, memory and time before the first step."""
