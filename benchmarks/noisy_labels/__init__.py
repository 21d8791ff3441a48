"""Training on wrong labels, side by side: `python -m benchmarks.noisy_labels`."""
