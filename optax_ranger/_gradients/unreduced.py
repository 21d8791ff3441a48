"""One reduction of the gradients of micro-batches, where the compiler splits these."""

import bisect
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

_WHOLE = PartitionSpec()


def reduced_once(
  accumulate: Callable[..., Any], args: tuple[Any, ...], axes: tuple[str, ...]
) -> Any:
  """Adds up gradients of which each device keeps its part, until their sum is reduced.

  JAX's types say so: the cotangent of a parameter that is ``reduced`` over an explicit
  axis is ``unreduced``, one part of the sum on each device. Not every operation has a
  rule for it: products of matrices have one, split rows plus a bias don't. So the
  smallest parameters are left out, as many as need be: their gradients are reduced in
  every micro-batch.

  Args:
    accumulate: ``(params, start, shared, pieces) -> (grads, out)``.
    args: its arguments. ``pieces`` are ``((rows, keys), weights)``; rows and weights
      are ``[m, n, ...]``, m micro-batches of n rows.
    axes: the axes of the mesh, over which rows are split.

  Returns:
    What `accumulate` returns, or None if JAX's types allow it for no parameter.
  """
  params, *_ = args

  def has_rules(least):
    try:
      jax.eval_shape(_explicit(accumulate, params, axes, least), *args)
    except Exception:
      # JAX refuses what it has no rule for, with errors of many types. An error that is
      # the caller's comes again when the compiler splits everything.
      return False
    return True

  sizes = sorted({leaf.size for leaf in jax.tree.leaves(params)})
  first = bisect.bisect_left(sizes, True, key=has_rules)
  if first == len(sizes):
    return None
  return _explicit(accumulate, params, axes, sizes[first])(*args)


def _explicit(
  accumulate: Callable[..., Any], params: Any, axes: tuple[str, ...], least: int
) -> Callable[..., Any]:
  """`accumulate` with explicit axes; parameters of `least` entries are reduced."""

  def marked(spec: PartitionSpec) -> Any:
    return jax.tree.map(lambda leaf: spec if leaf.size >= least else _WHOLE, params)

  def function(*args):
    grads, out = accumulate(*args)
    return jax.tree.map(lambda grad: jax.sharding.reshard(grad, _WHOLE), grads), out

  reduced = marked(PartitionSpec(reduced=set(axes)))
  start = marked(PartitionSpec(unreduced=set(axes)))
  rows = PartitionSpec(None, axes)
  pieces = ((rows, _WHOLE), rows)
  return jax.sharding.explicit_axes(
    function, in_sharding=(reduced, start, _WHOLE, pieces)
  )
