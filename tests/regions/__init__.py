"""Partitions, and regions in training."""
