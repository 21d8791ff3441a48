"""Per-example gradients in micro-batches, and a part of every leaf at a time.

A step that is not linear needs all examples of an entry at once, but not all
entries: what is not kept of a leaf in one sweep over the examples is computed
again in another.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import gramian as gramian_lib
from optax_ranger._core.members import keep_rows
from optax_ranger._core.sharding import vary
from optax_ranger._core.sharding import varying_axes
from optax_ranger._core.tree import finite_rows
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._gradients import linear


def gradients_of(
  losses_of: Callable[..., Any],
  params: PyTree,
  batch: PyTree,
  seen: dict[str, Any],
  micro_batch_size: int,
) -> Callable[[Callable[[PyTree], Any]], Any]:
  """Returns a function that maps every example's gradient, and stacks the results.

  Args:
    losses_of: ``(params, batch, seen) -> losses``.
    params: what to differentiate by.
    batch: leaves of ``[n, ...]``.
    seen: extra args of the losses; those of leading axis n are split.
    micro_batch_size: how many gradients there are at once.

  Returns:
    ``visit -> [visit(gradient) of each example]``, leaves ``[n, ...]``.
  """
  n = jax.tree.leaves(batch)[0].shape[0]
  axes = frozenset().union(*map(varying_axes, jax.tree.leaves(batch)))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    missing = ", ".join(repr(axis) for axis in axes - varying_axes(leaf))
    if missing:
      raise ValueError(
        f"params{jax.tree_util.keystr(path)} is the same over the mesh axis"
        f" {missing}, over which the batch differs: JAX would add up examples of"
        " different devices before the step. Mark the parameters with"
        " jax.lax.pcast(params, axis, to='varying'); the gradient is then local."
      )

  def has_rows(arg):
    leaves = jax.tree.leaves(arg)
    return bool(leaves) and all(jnp.shape(leaf)[:1] == (n,) for leaf in leaves)

  by_row = {name: arg for name, arg in seen.items() if has_rows(arg)}
  shared = {name: arg for name, arg in seen.items() if name not in by_row}

  def sweep(visit):
    def one_example(rows):
      batch, by_row = jax.tree.map(lambda row: jnp.asarray(row)[None], rows)
      loss = lambda params: losses_of(params, batch, {**shared, **by_row})[0]
      return visit(jax.grad(loss)(params))

    return jax.lax.map(one_example, (batch, by_row), batch_size=micro_batch_size)

  return sweep


def finite_and_sizes(sweep: Callable[..., Any]) -> tuple[Array, Array]:
  """Which gradients are finite, and the largest magnitude in each, [n] each."""

  def visit(gradient):
    row = jax.tree.map(lambda leaf: leaf[None], gradient)
    return finite_rows(row, 1)[0], gramian_lib.sizes(row, 1)[0]

  return sweep(visit)


def gramian_in_sweeps(
  sweep: Callable[..., Any],
  params: PyTree,
  frame: gramian_lib.Frame,
  num_sweeps: int,
) -> Array:
  """Inner products of the examples' gradients, [n, n]."""
  n = frame.weights.shape[0]

  def one_sweep(index, total):
    rows = sweep(lambda gradient: jax.tree.map(_part(index, num_sweeps), gradient))
    for leaf, whole in zip(jax.tree.leaves(rows), jax.tree.leaves(params), strict=True):
      # Parts overlap at the end of a leaf; an entry counts once.
      start, width = _place(whole.size, index, num_sweeps)
      new = start + jnp.arange(width) >= index * width
      leaf = jnp.where(new[None], leaf, jnp.zeros_like(leaf))
      total = total + gramian_lib.of_leaf(leaf, frame).astype(total.dtype)
    return total

  start = _like(jnp.zeros([n, n], frame.weights.dtype), params, frame.weights)
  return jax.lax.fori_loop(0, num_sweeps, one_sweep, start)


def update_in_sweeps(
  sweep: Callable[..., Any],
  step: optax.GradientTransformationExtraArgs,
  state: PyTree,
  params: PyTree,
  finite: Array,
  args: dict[str, Any],
  num_sweeps: int,
) -> tuple[PyTree, PyTree]:
  """The step's result, computed for a part of every leaf in each sweep."""
  linear.refuse_unless_entrywise(step, finite.shape[0], state, args)

  def one_sweep(index, carry):
    results, _ = carry
    rows = sweep(lambda gradient: jax.tree.map(_part(index, num_sweeps), gradient))
    rows = jax.tree.map(lambda leaf: keep_rows(finite, leaf), rows)
    parts, new_state = step.update(rows, state, None, **args)

    def write(whole, part):
      start, _ = _place(whole.size, index, num_sweeps)
      return jax.lax.dynamic_update_slice(whole, part, (start,))

    return jax.tree.map(write, results, parts), new_state

  flat = jax.tree.map(lambda leaf: jnp.zeros([leaf.size], leaf.dtype), params)
  flat = jax.tree.map(lambda leaf: _like(leaf, params, finite, args), flat)
  # The new state is the same in every sweep.
  _, shapes = jax.eval_shape(lambda carry: one_sweep(0, carry), (flat, state))
  first = jax.tree.map(
    lambda leaf, like: vary(leaf, varying_axes(like)),
    state,
    shapes,
  )
  results, new_state = jax.lax.fori_loop(0, num_sweeps, one_sweep, (flat, first))
  shape = lambda part, leaf: part.reshape(leaf.shape)
  return jax.tree.map(shape, results, params), new_state


def _place(size: int, index: Any, num_sweeps: int) -> tuple[Any, int]:
  """Where a part of a leaf begins, and how long it is; the last ones overlap."""
  width = -(-size // num_sweeps)
  return jnp.minimum(index * width, size - width), width


def _part(index: Any, num_sweeps: int) -> Callable[[Array], Array]:
  def take(leaf: Array) -> Array:
    start, width = _place(leaf.size, index, num_sweeps)
    return jax.lax.dynamic_slice(leaf.reshape(-1), (start,), (width,))

  return take


def _like(array: Array, *trees: Any) -> Array:
  """Marks an array as differing over the axes over which one of `trees` does."""
  leaves = [leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array)]
  axes = frozenset().union(*map(varying_axes, leaves))
  return vary(array, axes) if axes else array
