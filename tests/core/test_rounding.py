"""Rounding by chance of special values; of sums, see `steps/test_accumulation.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ranger._core import rounding

# Its bits are all ones: they overflow where something is added.
LARGEST_NAN = np.array(2**32 - 1, np.uint32).view(np.float32)[()]


@jax.jit
def to_bfloat16(rows):
  return rounding.to(np.dtype(jnp.bfloat16), rows, rounding.seed(1, 2))


@pytest.mark.parametrize(
  "value", [np.inf, -np.inf, np.nan, LARGEST_NAN, 3.4e38, -0.0, 1e-45, 1.0]
)
def test_what_bfloat16_can_not_round(value):
  """Special values are those of a cast; what is exact stays."""
  found = to_bfloat16(np.full([64], value, np.float32))
  assert found.dtype == jnp.bfloat16
  wide = np.asarray(found, np.float32)
  if value == 3.4e38:  # Up to infinity, or down to the largest.
    assert {f"{each:.3g}" for each in wide} == {"inf", "3.39e+38"}
  elif value == 1e-45:
    assert (np.abs(wide) < 1e-40).all()
  else:
    np.testing.assert_array_equal(wide, np.full([64], value, np.float32))
