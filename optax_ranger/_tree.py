"""Helpers over pytrees, each in one pass, for any mix of types and shardings."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger import _numerics
from optax_ranger import _types


def select(
  condition: _types.Array, on_true: _types.PyTree, on_false: _types.PyTree
) -> _types.PyTree:
  """`where` leaf by leaf, on one scalar condition."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def zeros_like(tree: _types.PyTree) -> _types.PyTree:
  """Zeros of the same shapes, types and shardings."""
  return jax.tree.map(jnp.zeros_like, tree)


def all_finite(tree: _types.PyTree) -> _types.Array:
  """Whether every entry of every leaf is finite, as one boolean.

  A dot product with a small constant is finite exactly when the row is, and
  reads memory at full speed where `isfinite(...).all()` does not.
  """
  checks = []
  for leaf in jax.tree.leaves(tree):
    for part in _real_parts(leaf):
      if part.size == 0:
        continue
      part = jnp.atleast_1d(part.astype(_numerics.wide(part.dtype)))
      tiny = jnp.full(part.shape[-1:], 2.0**-100, part.dtype)
      checks.append(jnp.isfinite(part @ tiny).all())
  if not checks:
    return jnp.asarray(True)
  return jnp.stack(checks).all()


def finite_rows(tree: _types.PyTree, n: int) -> _types.Array:
  """Which of the n rows are finite in every leaf, as booleans [n]."""
  finite = jnp.ones([n], bool)
  for leaf in jax.tree.leaves(tree):
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      axes = tuple(range(1, leaf.ndim))
      rows = _numerics.replicate(jnp.isfinite(leaf).all(axis=axes))
      finite = jnp.logical_and(finite, rows)
  return finite


def inner_product(a: _types.PyTree, b: _types.PyTree) -> _types.Array:
  """The real inner product of two trees, in float32 or better, as one scalar."""
  total = jnp.zeros([], jnp.float32)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    for u, v in zip(_real_parts(x), _real_parts(y), strict=True):
      dtype = _numerics.widest(u.dtype, v.dtype, np.float32)
      part = jnp.sum(u.astype(dtype) * v.astype(dtype))
      total = total + part.astype(jnp.float32)
  return total


def find_states(state: _types.PyTree, kind: type) -> Iterator[Any]:
  """Yields the states of one kind, however deeply a chain nests them."""
  leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
  return (leaf for leaf in leaves if isinstance(leaf, kind))


def _real_parts(leaf: _types.Array) -> tuple[_types.Array, ...]:
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    return jnp.real(leaf), jnp.imag(leaf)
  return (leaf,)
