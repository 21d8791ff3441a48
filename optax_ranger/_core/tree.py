"""Pytrees: finite checks, inner products, states inside a chain."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ranger._core import numerics
from optax_ranger._core.platforms import for_one_cpu
from optax_ranger._core.sharding import replicate
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree

# So small that no sum of finite numbers overflows.
_TINY = 2.0**-100
# So large that the product with a number whose square overflows float32 does too.
_HUGE = 2.0**64
# Where a product with a constant vector beats a sum: shorter rows waste it, and
# the vector itself takes memory.
_DOT_WIDTHS = range(16, 2**16 + 1)


Dot = Callable[[Array, Array], Array]


def zeros_like(tree: PyTree) -> PyTree:
  """Zeros of the same shapes, types and shardings."""
  return jax.tree.map(jnp.zeros_like, tree)


def wide_copy(tree: PyTree) -> PyTree:
  """A copy in float32 or better, which shares no buffer with the tree."""
  return jax.tree.map(
    lambda leaf: jnp.array(leaf, dtype=numerics.wide(leaf.dtype), copy=True), tree
  )


def all_finite(tree: PyTree, *, squares: bool = False) -> Array:
  """Whether every entry of every leaf is finite, as one boolean.

  A sum of small multiples is finite exactly when they all are, and is read at
  the speed of memory where `isfinite(...).all()` is not. `max` won't do: on
  CPU, XLA's loses NaN.

  With `squares`, also whether their squares are, in float32: the sum of large
  multiples of a row (the last axis) is not if one entry is 2^64 or more, and is if
  the row's magnitudes add up to less.
  """
  checks = []
  multiple = _HUGE if squares else _TINY
  for leaf in jax.tree.leaves(tree):
    for part in _real_parts(leaf):
      if squares and part.dtype == jnp.float64:
        part = part.astype(jnp.float32)
      if part.ndim > 1 and part.shape[-1] in _DOT_WIDTHS and _is_wide(part):
        sums = part @ jnp.full(part.shape[-1:], multiple, part.dtype)
      else:
        sums = _multiple(part, multiple).sum(axis=-1 if squares and part.ndim else None)
      checks.append(jnp.isfinite(sums).all())
  if not checks:
    return jnp.asarray(True)
  return jnp.stack(checks).all()


def finite_rows(tree: PyTree, n: int) -> Array:
  """Which of the n rows are finite in every leaf, as booleans [n]."""
  finite = jnp.ones([n], bool)
  for leaf in jax.tree.leaves(tree):
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      for part in _real_parts(leaf):
        sums = _multiple(part, _TINY).sum(axis=tuple(range(1, part.ndim)))
        finite = jnp.logical_and(finite, replicate(jnp.isfinite(sums)))
  return finite


def inner_product(a: PyTree, b: PyTree, dot: Dot | None = None) -> Array:
  """The real inner product of two trees, in float32 or better, as one scalar."""
  dot = dot or (lambda u, v: jnp.sum(u * v))
  total = jnp.zeros([], jnp.float32)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    for u, v in zip(_real_parts(x), _real_parts(y), strict=True):
      dtype = numerics.widest(u.dtype, v.dtype, np.float32)
      part = dot(u.astype(dtype), v.astype(dtype))
      total = total + part.astype(jnp.float32)
  return total


def squared_norm(tree: PyTree) -> Array:
  """The squared norm of a tree, in float32 or better, as one scalar."""
  square = lambda leaf: inner_product(leaf, leaf)
  # Else XLA's CPU back end would share the squares with an optimizer that needs them
  # too, and write them to memory.
  apart = lambda leaf: square(jax.lax.optimization_barrier(leaf))
  norms = [for_one_cpu(leaf, apart, square)(leaf) for leaf in jax.tree.leaves(tree)]
  return sum(norms, jnp.zeros([], jnp.float32))


def find_states(state: PyTree, is_one: Callable[[Any], bool]) -> Iterator[Any]:
  """Yields the states that are wanted, however deeply a chain nests them."""
  return filter(is_one, jax.tree.leaves(state, is_leaf=is_one))


def leaves_like(tree: PyTree, copy: PyTree) -> list[Any]:
  """The leaves of a copy in the order of the tree's, None where it is masked."""
  found: list[Any] = []
  masked = lambda node: isinstance(node, optax.MaskedNode)

  def visit(node, part):
    found.extend([None] * len(jax.tree.leaves(part)) if masked(node) else [node])

  jax.tree.map(visit, unboxed(copy), unboxed(tree), is_leaf=masked)
  return found


def is_nnx_module(tree: Any) -> bool:
  """Whether this is a model of Flax NNX, by name: Flax need not be installed."""
  return any(
    kind.__module__.startswith("flax.nnx") and kind.__name__ == "Module"
    for kind in type(tree).__mro__
  )


def unboxed(tree: PyTree) -> PyTree:
  """The arrays of a tree whose leaves Flax NNX wraps in variables."""
  # By what they can do: this package does not import Flax.
  boxed = lambda node: hasattr(node, "get_value") and hasattr(node, "get_metadata")
  return jax.tree.map(
    lambda node: node.get_value() if boxed(node) else node, tree, is_leaf=boxed
  )


def _real_parts(leaf: Array) -> tuple[Array, ...]:
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    return jnp.real(leaf), jnp.imag(leaf)
  return (leaf,)


def _is_wide(part: Array) -> bool:
  return part.dtype == numerics.wide(part.dtype)


def _multiple(part: Array, factor: float) -> Array:
  if not _is_wide(part):
    # Another use of the same cast would make XLA keep it, in float32.
    part = jax.lax.optimization_barrier(part)
  dtype = numerics.wide(part.dtype)
  return part.astype(dtype) * jnp.asarray(factor, dtype)
