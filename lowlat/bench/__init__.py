"""Benchmark prefill and decode of lowlat and peer programs against the roofline of the machine.

Latency of a server (TTFT and ITL percentiles): benchmarks/serve.py.
"""
