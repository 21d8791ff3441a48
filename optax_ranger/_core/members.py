"""The one rule for non-finite members: examples, regions or devices still apart.

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

from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.sharding import after
from optax_ranger._core.sharding import is_sharded
from optax_ranger._core.sharding import per_row
from optax_ranger._core.sharding import replicate
from optax_ranger._core.sharding import reshard
from optax_ranger._core.tree import finite_rows
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import transformation


@states.exportable
class MemberState(NamedTuple):
  """The state of a step over members.

  Attributes:
    num_dropped: ``int32``, how many members were left out so far because they
      were not finite.
  """

  num_dropped: Array


class Members(NamedTuple):
  """Members fit for use: absent ones are zero and have weight zero."""

  updates: PyTree
  weights: Array
  declared: Array  # the sum of all weights that were asked for
  state: MemberState


def init_members(params: PyTree) -> MemberState:
  """Starts the counter; nothing of the parameters' size is kept."""
  del params
  return MemberState(num_dropped=numerics.zero_count())


def present_members(
  updates: PyTree,
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
  validate.state(state, MemberState, "a step over members")
  n = validate.leading_axis("updates", updates)
  if n is None:
    return None
  validate.inexact_leaves("updates", updates, "a step over members")
  leaves = jax.tree.leaves(updates)
  widest = numerics.widest(jnp.float32, *(leaf.dtype for leaf in leaves))
  dtype = numerics.real(widest)
  finite = None
  if num_dropped is None:
    finite = finite_rows(updates, n)
  weights, declared, not_usable = clean_weights(member_weights, n, dtype, finite)
  if num_dropped is None:
    num_dropped = not_usable
  return Members(
    updates=jax.tree.map(lambda leaf: keep_rows(weights > 0, leaf), updates),
    weights=weights,
    declared=declared,
    state=MemberState(numerics.increment(state.num_dropped, num_dropped)),
  )


def clean_weights(
  member_weights: Any,
  n: int,
  dtype: Any = jnp.float32,
  finite: Array | None = None,
) -> tuple[Array, Array, Array]:
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
    validate.shape("member_weights", member_weights, (n,))
    asked = replicate(jnp.asarray(member_weights).astype(dtype))
  # Both comparisons are False for NaN: a weight of NaN counts as zero.
  usable = jnp.logical_and(asked > 0, asked < jnp.inf)
  declared = jnp.where(usable, asked, jnp.zeros_like(asked)).sum()
  if finite is not None:
    usable = jnp.logical_and(usable, finite)
  num_dropped = jnp.logical_and(asked != 0, jnp.logical_not(usable)).sum()
  return jnp.where(usable, asked, jnp.zeros_like(asked)), declared, num_dropped


def keep_rows(keep: Array, leaf: Array) -> Array:
  """Replaces the rows that are not kept by zeros."""
  return jnp.where(per_row(keep, leaf), leaf, jnp.zeros_like(leaf))


def gather_rows(leaf: Array) -> Array:
  """Gathers members that are split over explicit axes; other axes stay split."""
  if is_sharded(leaf):
    rest = jax.typeof(leaf).sharding.spec[1:]
    return reshard(leaf, PartitionSpec(None, *rest))
  return leaf


def weighted_sum(weights: Array, leaf: Array) -> Array:
  """Sums over the leading axis, [n, ...] to [...], in float32 or better."""
  dtype = numerics.wide(leaf.dtype)
  contract = (((0,), (0,)), ((), ()))
  return jax.lax.dot_general(
    weights.astype(dtype),
    leaf.astype(dtype),
    contract,
    precision=jax.lax.Precision.HIGHEST,
  )


def combine(shares: Array, updates: PyTree, *, one_by_one: bool) -> PyTree:
  """Sums the members with these weights; those of weight zero are left out.

  With `one_by_one`, a leaf waits for the one before it, as in `aggregator`.
  """
  leaves, structure = jax.tree.flatten(updates)
  reduced: list[Array] = []
  for leaf in leaves:
    if one_by_one and reduced:
      shares = after(reduced[-1], shares)
    kept = keep_rows(shares != 0, leaf)
    reduced.append(weighted_sum(shares, kept).astype(leaf.dtype))
  return jax.tree.unflatten(structure, reduced)


def aggregator(
  reduce: Callable[[Members], Callable[[Array], Any]],
  *,
  one_by_one: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """A step that reduces each leaf alike, once absent members are left out.

  With `one_by_one`, a leaf waits for the one before it, so that temporaries are
  those of one leaf; a linear step has none, and must not look at its results.
  """

  def update(
    updates: PyTree,
    state: MemberState,
    params: PyTree = None,
    *,
    member_weights: Any = None,
    num_dropped: Any = None,
    **extra_args: Any,
  ) -> tuple[PyTree, MemberState]:
    del params, extra_args
    members = present_members(updates, state, member_weights, num_dropped)
    if members is None:
      return updates, state
    leaves, structure = jax.tree.flatten(members.updates)
    reduced: list[Array] = []
    for leaf in leaves:
      if one_by_one and reduced:
        waiting = after(reduced[-1], members.weights)
        members = members._replace(weights=waiting)
      reduced.append(reduce(members)(leaf).astype(leaf.dtype))
    return jax.tree.unflatten(structure, reduced), members.state

  return transformation(init_members, update)
