"""Shared parts of the server benchmarks: start servers, send requests, evaluate responses."""
