"""Benchmark prefill and decode of lowlat and peer programs against the roofline of the machine."""
