"""The engine: fusion, micro-batches and sweeps."""
