"""Training on wrong labels: `python -m benchmarks.learning.noisy_labels`."""
