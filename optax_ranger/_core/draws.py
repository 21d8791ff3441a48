"""Generators of our own draws, which no draw of a user repeats.

Who flips labels with `default_rng(0)` must not find that a sample drawn with seed 0
consists of flipped labels.
"""

import jax
import numpy as np

from optax_ranger._core.types import Array

# Any number that nobody takes for a seed.
_OURS = 0x0A37_9E55


def generator(seed: int, *purpose: int) -> np.random.Generator:
  """NumPy's generator for a seed and a purpose."""
  return np.random.default_rng([seed, _OURS, *purpose])


def key(seed: int) -> Array:
  """JAX's key for a seed."""
  return jax.random.fold_in(jax.random.key(seed), _OURS)
