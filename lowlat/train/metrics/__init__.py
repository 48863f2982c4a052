"""Metrics of training runs: records, log, TensorBoard files, live view, report."""
