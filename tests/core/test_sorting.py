"""Sorting networks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ranger._core import sorting


@pytest.mark.parametrize("n", range(1, 13))
def test_sorts_all_rows_of_bits(n):
  """By the 0-1 principle, it then sorts everything."""
  patterns = np.array([*itertools.product((0, 1), repeat=n)], np.int8)
  rows = list(patterns.T)
  for i, j in sorting.comparators(n):
    rows[i], rows[j] = np.minimum(rows[i], rows[j]), np.maximum(rows[i], rows[j])
  np.testing.assert_array_equal(rows, np.sort(patterns, axis=1).T)


@pytest.mark.parametrize("n", [5, 9])
def test_others_go_along(n):
  rng = np.random.default_rng(n)
  keys, others = rng.standard_normal([2, n, 50]).astype(np.float32)
  keys[n // 2] = np.inf
  sort = jax.jit(lambda *rows: sorting.sort_rows(*map(list, rows)))
  found = sort(jnp.asarray(keys), jnp.asarray(others))
  order = np.argsort(keys, axis=0)
  for rows, given in zip(found, (keys, others), strict=True):
    np.testing.assert_array_equal(rows, np.take_along_axis(given, order, axis=0))
