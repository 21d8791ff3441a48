"""Speed and memory, beside rivals and the bandwidth floor."""
