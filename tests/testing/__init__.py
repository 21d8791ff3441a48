"""Tests of `optax_ranger.testing`."""
