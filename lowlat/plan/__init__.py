"""What training a model costs before it starts: FLOPs, memory, traffic, bubbles, time."""
