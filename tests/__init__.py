"""Tests: laws over one registry, oracles in NumPy, refusals, and real loops."""
