"""Scalars and data types that stay what they are, whatever comes in."""

from typing import Any

import jax.numpy as jnp

from optax_ranger import _types


def wide(dtype: Any) -> jnp.dtype:
  """The type to compute in: float32 for half precision, else `dtype` itself."""
  return jnp.promote_types(dtype, jnp.float32)


def real(dtype: Any) -> jnp.dtype:
  """The real type of the same precision as `dtype`."""
  return jnp.finfo(dtype).dtype


def scalar(value: Any, dtype: Any = jnp.float32) -> _types.Array:
  """A strongly typed scalar array; made in `init` and `update`, never earlier."""
  return jnp.asarray(value).astype(dtype)


def zero_count() -> _types.Array:
  """A counter at its start."""
  return jnp.zeros([], jnp.int32)


def increment(count: _types.Array, by: Any = 1) -> _types.Array:
  """Counts up, and stops at the largest int32 instead of turning negative."""
  top = jnp.iinfo(jnp.int32).max
  step = jnp.asarray(by).astype(jnp.int32)
  return jnp.where(count > top - step, jnp.asarray(top, jnp.int32), count + step)


def divide(numerator: _types.Array, denominator: _types.Array) -> _types.Array:
  """Divides by a scalar or by an array of the same shape; by zero gives zero.

  The denominator is real and not negative; the numerator may be complex.
  """
  positive = denominator > 0
  safe = jnp.where(positive, denominator, jnp.ones_like(denominator))
  quotient = numerator / safe.astype(numerator.dtype)
  return jnp.where(positive, quotient, jnp.zeros_like(numerator))


def per_row(vector: _types.Array, leaf: _types.Array) -> _types.Array:
  """Gives a vector [n] the rank of a leaf [n, ...], to broadcast against it."""
  return jnp.expand_dims(vector, tuple(range(1, jnp.ndim(leaf))))
