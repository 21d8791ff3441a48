"""Step 4: many gradients, of examples or of regions, become one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger import _members
from optax_ranger import _numerics
from optax_ranger import _types
from optax_ranger import _validate

_WAYS = ("mean", "sum", "max")


def aggregate_by_mean() -> optax.GradientTransformationExtraArgs:
  r"""Replaces the members' gradients by their weighted mean.

  .. math:: g = \sum_i m_i g_i \, / \, \sum_i m_i

  Linear, so ``value_and_grad`` fuses it into one ordinary backward pass.

  Extra args of ``update``:
    member_weights: ``float [n]``, token counts or a mask say; None for ones.
    num_dropped: how many members the caller has found not finite and given
      weight zero; without it, this step looks for itself.

  Shapes:
    ``[n, *shape]`` to ``[*shape]``, types kept, summed in float32 or better.
    The state is one counter.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * A member that is not finite, or whose weight is zero, counts for nothing
      (``test_absent_members_count_for_nothing``).
    * No member at all gives zeros (``test_no_member_gives_zeros``).
    * Permuting the members changes nothing (``test_aggregation_permutes``).

  Raises:
    ValueError: when leaves differ in their leading axis, or
      ``member_weights`` has another length.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_mean()
    >>> gradients = jnp.array([1.0, 2.0, jnp.nan])
    >>> mean, state = step.update(gradients, step.init(gradients))
    >>> print(mean, state.num_dropped)
    1.5 1
  """

  def reduce(members: _members.Members) -> Callable[[_types.Array], Any]:
    total = members.weights.sum()

    def mean(leaf: _types.Array) -> _types.Array:
      summed = _members.weighted_sum(members.weights, leaf)
      return _numerics.divide(summed, total)

    return mean

  return _aggregator(reduce)


def aggregate_by_sum() -> optax.GradientTransformationExtraArgs:
  r"""Replaces the members' gradients by their weighted sum.

  .. math:: g = \sum_i m_i g_i

  Extra args, shapes, guarantees and errors are those of ``aggregate_by_mean``.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_sum()
    >>> gradients = jnp.array([1.0, 2.0, 4.0])
    >>> total, _ = step.update(
    ...     gradients, step.init(gradients), member_weights=jnp.array([1, 1, 0]))
    >>> print(total)
    3.0
  """

  def reduce(members: _members.Members) -> Callable[[_types.Array], Any]:
    return lambda leaf: _members.weighted_sum(members.weights, leaf)

  return _aggregator(reduce)


def aggregate_by_max() -> optax.GradientTransformationExtraArgs:
  r"""Replaces the members' gradients, entry by entry, by the largest one.

  .. math:: g = g_{i^*}, \qquad i^* = \arg\max_i |g_i|

  The largest by magnitude, sign kept; of two that differ in sign only, the
  positive one. Of ``member_weights=`` it matters only which are zero. It is not
  linear: ``value_and_grad`` computes per-example gradients for it. Extra args,
  shapes, guarantees and errors are those of ``aggregate_by_mean``.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_max()
    >>> gradients = jnp.array([[1.0, 2.0], [-3.0, 1.0]])
    >>> largest, _ = step.update(gradients, step.init(gradients))
    >>> print(largest)
    [-3.  2.]
  """

  def reduce(members: _members.Members) -> Callable[[_types.Array], Any]:
    del members  # Absent rows are zeros, which are never the largest.
    return _largest

  return _aggregator(reduce)


def aggregate_by_regions(
  num_regions: int, *, within: str = "mean", across: str = "mean"
) -> optax.GradientTransformationExtraArgs:
  r"""Aggregates within each region of the data, then across the regions.

  With means, every region counts the same, however many examples it has: it
  helps where small regions matter, and hurts where a small region is only
  noise.

  .. math::
    g = \frac{\sum_r a_r g_r}{\sum_r a_r}, \qquad
    g_r = \frac{\sum_{i \in r} m_i g_i}{\sum_{i \in r} m_i}

  A region without members counts for nothing. Means and sums are linear and
  fuse; ``"max"`` is by magnitude, as in ``aggregate_by_max``.

  Args:
    num_regions: the number of regions, R; a static Python integer.
    within: ``"mean"``, ``"sum"`` or ``"max"``, within each region.
    across: the same, across regions.

  Extra args of ``update``:
    regions: ``int [n]``, each example's region; an example with an id outside
      of [0, R) is absent.
    region_weights: ``float [R]``, not negative; None for ones. Across regions
      by ``"max"`` it matters only which are zero.
    member_weights, num_dropped: as in ``aggregate_by_mean``.

  Shapes:
    ``[n, *shape]`` to ``[*shape]``. Linear choices hold no temporaries of
    ``[R, *shape]``. The state is one counter.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * An empty region counts for nothing
      (``test_empty_regions_count_for_nothing``).
    * One region, by mean, is ``aggregate_by_mean``
      (``test_one_region_is_the_mean``).
    * The guarantees of ``aggregate_by_mean``.

  Raises:
    TypeError: for a ``num_regions`` that is not a Python integer.
    ValueError: for other ways to aggregate, missing ``regions=``, and lengths
      that do not fit.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_regions(2)
    >>> gradients = jnp.array([1.0, 1.0, 1.0, 5.0])
    >>> balanced, _ = step.update(
    ...     gradients, step.init(gradients), regions=jnp.array([0, 0, 0, 1]))
    >>> print(balanced)  # each region counts the same
    3.0
  """
  _validate.static_count("num_regions", num_regions)
  _validate.choice("within", within, _WAYS)
  _validate.choice("across", across, _WAYS)

  def update(
    updates: _types.PyTree,
    state: _members.MemberState,
    params: _types.PyTree = None,
    *,
    regions: Any = None,
    region_weights: Any = None,
    member_weights: Any = None,
    num_dropped: Any = None,
    **extra_args: Any,
  ) -> tuple[_types.PyTree, _members.MemberState]:
    del params, extra_args
    _validate.given("regions", regions, "aggregate_by_regions")
    members = _members.present(updates, state, member_weights, num_dropped)
    if members is None:
      return updates, state
    n, dtype = members.weights.shape[0], members.weights.dtype
    _validate.shape("regions", regions, (n,))
    _validate.integers("regions", regions)
    # One row a region: a member's share of it. Ids out of range have no row.
    one_hot = jnp.arange(num_regions)[:, None] == jnp.asarray(regions)[None]
    member = jnp.where(one_hot, members.weights, jnp.zeros([], dtype))
    totals = member.sum(axis=1)
    if region_weights is None:
      region_weights = jnp.ones([num_regions], dtype)
    _validate.shape("region_weights", region_weights, (num_regions,))
    weights = jnp.asarray(region_weights).astype(dtype)
    alive = jnp.logical_and(weights > 0, weights < jnp.inf)
    alive = jnp.logical_and(alive, totals > 0)
    weights = jnp.where(alive, weights, jnp.zeros_like(weights))
    if within == "mean":
      member = _numerics.divide(member, totals[:, None])
    if across == "mean":
      weights = _numerics.divide(weights, weights.sum())

    def reduce(leaf: _types.Array) -> _types.Array:
      if "max" not in (within, across):
        return _members.weighted_sum(weights @ member, leaf)
      rows = leaf.astype(_numerics.wide(leaf.dtype))
      if within == "max":
        one_region = lambda row: _largest(_members.keep_rows(row > 0, rows))
      else:
        one_region = lambda row: _members.weighted_sum(row, rows)
      per_region = jax.lax.map(one_region, member)
      if across == "max":
        return _largest(_members.keep_rows(alive, per_region))
      return _members.weighted_sum(weights, per_region)

    reduced = jax.tree.map(
      lambda leaf: reduce(leaf).astype(leaf.dtype), members.updates
    )
    return reduced, members.state

  return _types.transformation(_members.init, update)


def _aggregator(
  reduce: Callable[[_members.Members], Callable[[_types.Array], Any]],
) -> optax.GradientTransformationExtraArgs:
  """A step that reduces each leaf alike, once absent members are left out."""

  def update(
    updates: _types.PyTree,
    state: _members.MemberState,
    params: _types.PyTree = None,
    *,
    member_weights: Any = None,
    num_dropped: Any = None,
    **extra_args: Any,
  ) -> tuple[_types.PyTree, _members.MemberState]:
    del params, extra_args
    members = _members.present(updates, state, member_weights, num_dropped)
    if members is None:
      return updates, state
    reduce_leaf = reduce(members)
    reduced = jax.tree.map(
      lambda leaf: reduce_leaf(leaf).astype(leaf.dtype), members.updates
    )
    return reduced, members.state

  return _types.transformation(_members.init, update)


def _largest(leaf: _types.Array) -> _types.Array:
  """The largest entry by magnitude along the leading axis; zero if it is empty."""
  if leaf.shape[0] == 0:
    return jnp.zeros(leaf.shape[1:], leaf.dtype)
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    index = jnp.abs(leaf).argmax(axis=0, keepdims=True)
    return jnp.take_along_axis(leaf, index, axis=0)[0]
  top, bottom = leaf.max(axis=0), leaf.min(axis=0)
  return jnp.where(top >= -bottom, top, bottom)
