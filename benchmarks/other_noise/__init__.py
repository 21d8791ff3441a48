"""Noise other than random wrong labels: `python -m benchmarks.other_noise`."""
