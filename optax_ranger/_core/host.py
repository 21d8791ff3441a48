"""Numbers in the type that they come in, before float32 loses their digits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import numerics


def is_wide(values: Any) -> bool:
  """Whether these are numbers of the host that float32 may not hold exactly."""
  if isinstance(values, jax.Array):
    return False
  dtype = np.asarray(values).dtype
  return dtype.kind in "iuf" and not np.can_cast(dtype, np.float32)


def difference(values: Any, origin: Any) -> Any:
  """Returns values - origin: subtracted in their own type, then floating-point.

  Integers do not wrap. On the host the result is float64; on the device it is
  float32, or float64 for such floats and, with x64, for integers.
  """
  dtype = np.dtype(np.float64)
  if isinstance(values, jax.Array):
    dtype = np.dtype(jnp.result_type(float))
    if jnp.issubdtype(values.dtype, jnp.floating):
      dtype = numerics.wide(values.dtype)
  if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (values, origin)):
    if isinstance(values, jax.Array):
      return values.astype(dtype) - origin.astype(dtype)
    with np.errstate(invalid="ignore", over="ignore"):
      return values.astype(dtype, copy=False) - origin.astype(dtype, copy=False)
  # Modulo 2**64 (2**32) the smaller is subtracted from the larger exactly.
  unsigned = np.uint64 if values.dtype.itemsize > 4 else np.uint32
  larger = values >= origin
  values, origin = values.astype(unsigned), origin.astype(unsigned)
  up, down = (values - origin).astype(dtype), (origin - values).astype(dtype)
  return (jnp if isinstance(values, jax.Array) else np).where(larger, up, -down)


def nearest_zero(values: np.ndarray) -> np.ndarray:
  """The number closest to zero in the range of each column, [d], finite rows only.

  Differences to it are never larger than the values, so that no digits are lost.
  """
  if values.dtype.kind == "f":
    values = values[np.isfinite(values).all(axis=1)]
  if not len(values):
    return np.zeros(values.shape[1:], values.dtype)
  zero = np.zeros([], values.dtype)
  return np.clip(zero, values.min(axis=0), values.max(axis=0))
