"""The one rule for members (examples, regions) that are still apart.

A member that is not finite, or whose weight is not positive, is absent. It is
left out by selection, never by multiplication: 0 * nan is nan.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from optax_ranger import _numerics
from optax_ranger import _tree
from optax_ranger import _types
from optax_ranger import _validate


class MemberState(NamedTuple):
  """The state of a step over members.

  Attributes:
    num_dropped: ``int32``, how many members were left out so far because they
      were not finite.
  """

  num_dropped: _types.Array


class Members(NamedTuple):
  """Members fit for use: absent ones are zero and have weight zero."""

  updates: _types.PyTree
  weights: _types.Array
  declared: _types.Array  # the sum of all weights that were asked for
  state: MemberState


def init(params: _types.PyTree) -> MemberState:
  """Starts the counter; nothing of the parameters' size is kept."""
  del params
  return MemberState(num_dropped=_numerics.zero_count())


def present(
  updates: _types.PyTree,
  state: MemberState,
  member_weights: Any = None,
  num_dropped: Any = None,
) -> Members | None:
  """Leaves absent members out and counts those that were not finite.

  Args:
    updates: leaves of ``[n, *shape]``.
    state: the counter.
    member_weights: ``float [n]``, or None for ones.
    num_dropped: how many members the caller has found not finite *and given
      weight zero already*; None to look for them here. With it, what is done
      to the updates is linear.

  Returns:
    The members, or None where the tree has no leaves.
  """
  n = _validate.leading_axis("updates", updates)
  if n is None:
    return None
  _validate.inexact_leaves("updates", updates, "a step over members")
  leaves = jax.tree.leaves(updates)
  widest = _numerics.widest(jnp.float32, *(leaf.dtype for leaf in leaves))
  dtype = _numerics.real(widest)
  finite = None
  if num_dropped is None:
    finite = _tree.finite_rows(updates, n)
  weights, declared, not_usable = clean_weights(member_weights, n, dtype, finite)
  if num_dropped is None:
    num_dropped = not_usable
  return Members(
    updates=jax.tree.map(lambda leaf: keep_rows(weights > 0, leaf), updates),
    weights=weights,
    declared=declared,
    state=MemberState(_numerics.increment(state.num_dropped, num_dropped)),
  )


def clean_weights(
  member_weights: Any,
  n: int,
  dtype: Any = jnp.float32,
  finite: _types.Array | None = None,
) -> tuple[_types.Array, _types.Array, _types.Array]:
  """Gives the absent members weight zero.

  Args:
    member_weights: ``float [n]``, or None for ones.
    n: the number of members.
    dtype: the type of the weights.
    finite: ``bool [n]``, which members are finite; None if all are.

  Returns:
    The weights, their sum before members that are not finite were left out, and
    how many that asked for a weight were given none.
  """
  if member_weights is None:
    asked = jnp.ones([n], dtype)
  else:
    _validate.shape("member_weights", member_weights, (n,))
    asked = _numerics.replicate(jnp.asarray(member_weights).astype(dtype))
  # Both comparisons are False for NaN: a weight that is none counts as zero.
  usable = jnp.logical_and(asked > 0, asked < jnp.inf)
  declared = jnp.where(usable, asked, jnp.zeros_like(asked)).sum()
  if finite is not None:
    usable = jnp.logical_and(usable, finite)
  num_dropped = jnp.logical_and(asked != 0, jnp.logical_not(usable)).sum()
  return jnp.where(usable, asked, jnp.zeros_like(asked)), declared, num_dropped


def keep_rows(keep: _types.Array, leaf: _types.Array) -> _types.Array:
  """Replaces the rows that are not kept by zeros."""
  return jnp.where(_numerics.per_row(keep, leaf), leaf, jnp.zeros_like(leaf))


def gather_rows(leaf: _types.Array) -> _types.Array:
  """Gathers members that are split over explicit axes; other axes stay split."""
  if _numerics.is_sharded(leaf):
    rest = jax.typeof(leaf).sharding.spec[1:]
    return _numerics.reshard(leaf, PartitionSpec(None, *rest))
  return leaf


def weighted_sum(weights: _types.Array, leaf: _types.Array) -> _types.Array:
  """Sums over the leading axis, [n, ...] to [...], in float32 or better."""
  dtype = _numerics.wide(leaf.dtype)
  contract = (((0,), (0,)), ((), ()))
  return jax.lax.dot_general(
    weights.astype(dtype),
    leaf.astype(dtype),
    contract,
    precision=jax.lax.Precision.HIGHEST,
  )


def aggregator(
  reduce: Callable[[Members], Callable[[_types.Array], Any]],
  *,
  one_by_one: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """A step that reduces each leaf alike, once absent members are left out.

  With `one_by_one`, a leaf waits for the one before it, so that temporaries are
  those of one leaf; a linear step has none, and must not look at its results.
  """

  def update(
    updates: _types.PyTree,
    state: MemberState,
    params: _types.PyTree = None,
    *,
    member_weights: Any = None,
    num_dropped: Any = None,
    **extra_args: Any,
  ) -> tuple[_types.PyTree, MemberState]:
    del params, extra_args
    members = present(updates, state, member_weights, num_dropped)
    if members is None:
      return updates, state
    leaves, structure = jax.tree.flatten(members.updates)
    reduced: list[_types.Array] = []
    for leaf in leaves:
      if one_by_one and reduced:
        waiting = _numerics.after(reduced[-1], members.weights)
        members = members._replace(weights=waiting)
      reduced.append(reduce(members)(leaf).astype(leaf.dtype))
    return jax.tree.unflatten(structure, reduced), members.state

  return _types.transformation(init, update)
