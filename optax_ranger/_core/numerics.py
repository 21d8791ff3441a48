"""Scalars and dtypes: promotion, division that is safe at zero, counters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree


def widest(*dtypes: Any) -> np.dtype:
  """The type that holds them all, also where strict promotion refuses to choose."""
  return functools.reduce(np.promote_types, map(np.dtype, dtypes))


def wide(dtype: Any) -> np.dtype:
  """The type to compute in: float32 for half precision, else `dtype` itself."""
  return widest(dtype, np.float32)


def real(dtype: Any) -> np.dtype:
  """The real type of the same precision as `dtype`."""
  return np.dtype(jnp.finfo(dtype).dtype)


def scalar(value: Any, dtype: Any = jnp.float32) -> Array:
  """A strongly typed scalar array; made in `init` and `update`, never earlier."""
  return jnp.asarray(value).astype(dtype)


def widest_real(tree: PyTree) -> np.dtype:
  """The real type that loses no digit of any leaf, float32 at least."""
  leaves = jax.tree.leaves(tree)
  return widest(np.float32, *(real(wide(leaf.dtype)) for leaf in leaves))


def one_minus(value: Any, dtype: Any = jnp.float32) -> Array:
  """One minus a number, such as a decay near 1, to the last digit of `dtype`.

  Rounded to float32 first, a decay of 0.999999 would lose a twentieth of it.
  """
  if isinstance(value, (int, float, np.number)):
    return scalar(1 - np.float64(value), dtype)
  return 1 - scalar(value, dtype)


def zero_count() -> Array:
  """A counter at its start."""
  return jnp.zeros([], jnp.int32)


def increment(count: Array, by: Any = 1) -> Array:
  """Counts up, and stops at the largest int32 instead of turning negative."""
  top = jnp.iinfo(jnp.int32).max
  step = jnp.asarray(by).astype(jnp.int32)
  return jnp.where(count > top - step, jnp.asarray(top, jnp.int32), count + step)


def divide(numerator: Array, denominator: Array) -> Array:
  """Divides by a scalar or an array of the same rank; by zero gives zero.

  The denominator is real and not negative; the numerator may be complex.
  """
  positive = denominator > 0
  safe = jnp.where(positive, denominator, jnp.ones_like(denominator))
  quotient = numerator / safe.astype(numerator.dtype)
  return jnp.where(positive, quotient, jnp.zeros_like(numerator))


def to_peak(rows: Array, axis: int = 1) -> Array:
  """Scales rows [n, C], not negative, to a peak of exactly one; zeros stay.

  With `axis=0`, the columns.
  """
  peak = rows.max(axis=axis, keepdims=True, initial=0)
  highest = jnp.logical_and(rows == peak, peak > 0)
  # XLA multiplies by the reciprocal: of 3e38 it would be flushed to zero.
  rows, peak = (jnp.where(peak > 1, each / 4, each) for each in (rows, peak))
  rows = jnp.minimum(divide(rows, peak), jnp.ones_like(rows))
  return jnp.where(highest, jnp.ones_like(rows), rows)


def shift(values: Array, exponent: Array) -> Array:
  """Times a power of two, in two steps: one factor could leave the range."""
  half = exponent // 2
  one = jnp.ones([], values.dtype)
  return values * jnp.ldexp(one, half) * jnp.ldexp(one, exponent - half)


def step_towards(old: Array, new: Array, rate: Any) -> Array:
  """Goes a part of the way from `old` to `new`, in the type of `old`."""
  return old + scalar(rate, old.dtype) * (new.astype(old.dtype) - old)


def scaled(factor: Array, direction: Array, dtype: Any, good: Array) -> Array:
  """The factor times the direction in type `dtype`; zeros where it isn't good."""
  new = factor.astype(direction.dtype) * direction
  if dtype == jnp.float16:  # The one type whose range a direction leaves.
    top = jnp.asarray(jnp.finfo(dtype).max, direction.dtype)
    new = jnp.clip(new, -top, top)
  new = new.astype(dtype)
  good = jnp.logical_and(good, jnp.isfinite(new))
  return jnp.where(good, new, jnp.zeros_like(new))
