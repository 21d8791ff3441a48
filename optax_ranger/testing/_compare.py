"""Assertions on trees that say what differs, and where."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core.types import PyTree


def _pairs(what: str, actual: PyTree, expected: PyTree) -> list[tuple[str, Any, Any]]:
  got, wanted = jax.tree.structure(actual), jax.tree.structure(expected)
  assert got == wanted, f"{what}: the structure is {got}, not {wanted}"
  leaves = jax.tree_util.tree_leaves_with_path(actual)
  others = jax.tree.leaves(expected)
  name = lambda path: what + jax.tree_util.keystr(path)
  return [(name(p), a, b) for (p, a), b in zip(leaves, others, strict=True)]


def numbers(leaf: Any) -> np.ndarray:
  """A leaf as an array of NumPy, typed keys as the numbers that they are made of."""
  if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


def close(what: str, actual: PyTree, expected: PyTree, rtol: float = 1e-5) -> None:
  """Asserts that values agree to `rtol`, relative and absolute.

  Numbers of fewer than 32 bits have 1e-2 at least.
  """
  for name, a, b in _pairs(what, actual, expected):
    a, b, allowed = numbers(a), numbers(b), rtol
    if jnp.issubdtype(a.dtype, jnp.inexact) and a.dtype.itemsize < 4:
      a, b, allowed = a.astype(np.float32), b.astype(np.float32), max(rtol, 1e-2)
    np.testing.assert_allclose(a, b, rtol=allowed, atol=allowed, err_msg=name)


def same(what: str, actual: PyTree, expected: PyTree) -> None:
  """Asserts that values are equal, bit for bit; NaN equals NaN."""
  for name, a, b in _pairs(what, actual, expected):
    np.testing.assert_array_equal(numbers(a), numbers(b), err_msg=name)


def same_types(what: str, actual: PyTree, expected: PyTree) -> None:
  """Asserts that shapes, data types, weak types and shardings agree."""
  for name, a, b in _pairs(what, actual, expected):
    got, wanted = _type(a), _type(b)
    assert got == wanted, f"{name}: the type is {got}, not {wanted}"


def _type(leaf: Any) -> str:
  """As JAX writes it; abstract arrays too."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    kind = f"{leaf.dtype}{list(leaf.shape)}"
    weak = leaf.weak_type
    spec = getattr(leaf.sharding, "spec", None)
  else:
    kind = f"{leaf.dtype}{list(leaf.shape)}"
    weak = jax.typeof(leaf).weak_type
    spec = getattr(jax.typeof(leaf).sharding, "spec", None)
  parts = [str(axis) for axis in spec or () if axis is not None]
  return kind + ", weakly typed" * bool(weak) + f", split over {parts}" * bool(parts)


def finite(what: str, tree: PyTree) -> None:
  """Asserts that no leaf holds NaN or infinity."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      count = int((~np.isfinite(np.asarray(leaf))).sum())
      name = what + jax.tree_util.keystr(path)
      assert not count, f"{name}: {count} of {leaf.size} entries are not finite"
