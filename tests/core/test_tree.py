"""Finite checks and norms of trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ranger._core import tree

finite = jax.jit(tree.all_finite, static_argnames="squares")


def bad_values(dtype):
  real = [np.nan, np.inf, -np.inf]
  return [*real, *(complex(1, bad) for bad in real)] if dtype == "complex64" else real


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (5, 64), (2, 3, 2**17)])
def test_one_bad_entry_is_seen(dtype, shape):
  leaf = np.full(shape, 3e4, jnp.dtype(dtype))
  for squares in (False, True):
    assert finite({"a": leaf, "b": leaf}, squares=squares)
    for bad in bad_values(dtype):
      wrong = leaf.copy()
      wrong[(-1,) * len(shape)] = bad
      assert not finite({"a": leaf, "b": wrong}, squares=squares)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_the_row_of_a_bad_entry_is_seen(dtype):
  leaf = np.full((5, 3, 2), 3e4, jnp.dtype(dtype))
  finite_rows = jax.jit(lambda rows: tree.finite_rows(rows, 5))
  for bad in bad_values(dtype):
    wrong = leaf.copy()
    wrong[3, 1, 0] = bad
    rows = finite_rows({"a": leaf, "b": wrong})
    np.testing.assert_array_equal(rows, [True, True, True, False, True])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(4,), (3, 64), (2, 2**16)])
def test_squares_that_overflow_are_seen(dtype, shape):
  signs = np.where(np.arange(np.prod(shape)) % 2 == 0, 1.0, -1.0).reshape(shape)
  of_dtype = lambda rows: rows.astype(jnp.dtype(dtype))
  with jax.enable_x64(dtype == "float64"):
    assert finite(of_dtype(signs * 2.0**47), squares=True)
    assert finite(of_dtype(2.0**47 * np.abs(signs)), squares=True)
    for large in (2.0**64, -1e30):
      one = of_dtype(np.ones(shape))
      one[(1,) * len(shape)] = large
      assert not finite(one, squares=True)
      assert finite(one)
    assert not finite(of_dtype(signs * 2.0**64), squares=True)


def test_nothing_is_finite():
  assert tree.all_finite({})
  assert tree.all_finite(jnp.zeros([0, 3]), squares=True)


@pytest.mark.parametrize("compile_", [True, False])
def test_the_squared_norm(compile_):
  rng = np.random.default_rng(0)
  parts = [rng.standard_normal(s).astype(np.float32) for s in ((), (3,), (40, 50))]
  expected = sum((part.astype(float) ** 2).sum() for part in parts)
  norm = jax.jit(tree.squared_norm) if compile_ else tree.squared_norm
  np.testing.assert_allclose(norm([jnp.asarray(p) for p in parts]), expected, rtol=1e-6)
  np.testing.assert_allclose(norm(jnp.array([3 + 4j])), 25)
  assert norm({}) == 0
