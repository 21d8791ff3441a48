"""Noise other than random wrong labels: `python -m benchmarks.learning.other_noise`."""
