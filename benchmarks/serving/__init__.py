"""What the benchmarks of servers share: starting servers, asking them, figures of the answers."""
