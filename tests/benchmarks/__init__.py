"""The benchmarks: what they measure, and that they resume."""
