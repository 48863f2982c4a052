"""Cost models of training (FLOPs, memory, traffic, pipeline bubbles, time) and `serving`."""
