"""Rounding to bfloat16 up or down by chance, so that sums stay unbiased."""

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import numerics
from optax_ranger._core.sharding import like
from optax_ranger._core.types import Array

# Bits of float32 that bfloat16 has not.
_LOST = 16
_GOLDEN = np.uint32(0x9E3779B9)


def seed(*numbers: Array | int) -> Array:
  """Mixes whole numbers to the seed of one rounding, ``uint32``."""
  mixed = jnp.zeros([], jnp.uint32)
  for number in numbers:
    mixed = _mix(mixed + jnp.asarray(number).astype(jnp.uint32) * _GOLDEN + _GOLDEN)
  return mixed


def to(dtype: np.dtype, array: Array, seed: Array) -> Array:
  """Casts to `dtype`; to bfloat16, a number in between goes up or down by chance.

  It goes up with the probability that makes its expectation the number itself.
  """
  array = array.astype(numerics.wide(array.dtype))
  if dtype != jnp.bfloat16 or array.dtype != jnp.float32:
    return array.astype(dtype)
  # A hash of the place: no array of random bits is written to memory.
  place = jnp.zeros(array.shape, jnp.uint32)
  for axis, size in enumerate(array.shape):
    place = place * np.uint32(size % 2**32)
    place = place + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
  chance = _mix(like(place, array) * _GOLDEN ^ seed) >> np.uint32(32 - _LOST)
  bits = jax.lax.bitcast_convert_type(array, jnp.uint32) + chance
  rounded = jax.lax.bitcast_convert_type(
    (bits >> np.uint32(_LOST)).astype(jnp.uint16), jnp.bfloat16
  )
  # The bits of a NaN plus something may be those of a number.
  return jnp.where(jnp.isfinite(array), rounded, array.astype(dtype))


def _mix(x: Array) -> Array:
  """A hash of 32 bits: "lowbias32" of C. Wellons' hash-prospector."""
  x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
  x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
  return x ^ x >> np.uint32(16)
