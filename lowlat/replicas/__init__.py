"""Replicas of a model on Ray Serve (data parallelism), with prefix-aware request routing.

    serve run lowlat.replicas.application:build model=default threads=8

A gateway takes HTTP requests, and `PrefixRouter` sends each to the replica that has the prefix of
its prompt in its KV cache. Ray starts, checks, drains and restarts the replicas.
"""
