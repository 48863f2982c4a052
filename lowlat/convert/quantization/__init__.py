"""Calibrated quantization: activation statistics of every projection, from calibration text."""
