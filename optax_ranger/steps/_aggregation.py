"""Step 4: many gradients, of examples or of regions, become one."""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import labels
from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.members import Members
from optax_ranger._core.members import MemberState
from optax_ranger._core.members import aggregator
from optax_ranger._core.members import init_members
from optax_ranger._core.members import keep_rows
from optax_ranger._core.members import present_members
from optax_ranger._core.members import weighted_sum
from optax_ranger._core.sharding import replicate
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import transformation

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
    * Non-finite members and members of weight zero are left out.
    * Without a member the result is zeros.
    * Permuting the members changes nothing.

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

  def reduce(members: Members) -> Callable[[Array], Any]:
    total = members.weights.sum()

    def mean(leaf: Array) -> Array:
      summed = weighted_sum(members.weights, leaf)
      return numerics.divide(summed, total)

    return mean

  return aggregator(reduce)


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

  def reduce(members: Members) -> Callable[[Array], Any]:
    return lambda leaf: weighted_sum(members.weights, leaf)

  return aggregator(reduce)


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

  def reduce(members: Members) -> Callable[[Array], Any]:
    del members  # Absent rows are zeros, which are never the largest.
    return _largest

  return aggregator(reduce)


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
    * Empty regions are left out.
    * One region, by mean, is ``aggregate_by_mean``.
    * The guarantees of ``aggregate_by_mean``.

  Raises:
    TypeError: for a ``num_regions`` that is not a Python integer.
    ValueError: for other ways to aggregate, missing ``regions=``, and lengths
      that do not fit.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_regions(2)
    >>> gradients = jnp.array([1.0, 1.0, 1.0, 5.0])
    >>> balanced, _ = jax.jit(step.update)(
    ...     gradients, step.init(gradients), regions=jnp.array([0, 0, 0, 1]))
    >>> print(balanced)  # each region counts the same
    3.0
  """
  validate.static_count("num_regions", num_regions)
  validate.choice("within", within, _WAYS)
  validate.choice("across", across, _WAYS)

  def update(
    updates: PyTree,
    state: MemberState,
    params: PyTree = None,
    *,
    regions: Any = None,
    region_weights: Any = None,
    member_weights: Any = None,
    num_dropped: Any = None,
    **extra_args: Any,
  ) -> tuple[PyTree, MemberState]:
    del params, extra_args
    validate.given("regions", regions, "aggregate_by_regions")
    members = present_members(updates, state, member_weights, num_dropped)
    if members is None:
      return updates, state
    n, dtype = members.weights.shape[0], members.weights.dtype
    validate.shape("regions", regions, (n,))
    validate.integers("regions", regions)
    # One row a region: a member's share of it. Ids out of range have no row.
    ids = labels.fit("regions", regions)
    one_hot = jnp.arange(num_regions, dtype=jnp.int32)[:, None] == ids[None]
    member = jnp.where(one_hot, members.weights, jnp.zeros([], dtype))
    totals = member.sum(axis=1)
    if region_weights is None:
      region_weights = jnp.ones([num_regions], dtype)
    validate.shape("region_weights", region_weights, (num_regions,))
    weights = jnp.asarray(region_weights).astype(dtype)
    alive = jnp.logical_and(weights > 0, weights < jnp.inf)
    alive = jnp.logical_and(alive, totals > 0)
    weights = jnp.where(alive, weights, jnp.zeros_like(weights))
    if within == "mean":
      member = numerics.divide(member, totals[:, None])
    if across == "mean":
      weights = numerics.divide(weights, weights.sum())

    def reduce(leaf: Array) -> Array:
      if "max" not in (within, across):
        return weighted_sum(weights @ member, leaf)
      rows = leaf.astype(numerics.wide(leaf.dtype))
      if within == "max":
        one_region = lambda row: _largest(keep_rows(row > 0, rows))
      else:
        one_region = lambda row: weighted_sum(row, rows)
      per_region = jax.lax.map(one_region, member)
      if across == "max":
        return _largest(keep_rows(alive, per_region))
      return weighted_sum(weights, per_region)

    reduced = jax.tree.map(
      lambda leaf: reduce(leaf).astype(leaf.dtype), members.updates
    )
    return reduced, members.state

  return transformation(init_members, update)


@states.exportable
class WorstRegionsState(NamedTuple):
  """The state of ``aggregate_by_worst_regions``.

  Attributes:
    num_dropped: ``int32``, members left out so far because they were not finite.
    log_weights: ``float32 [num_regions]``, logarithms of the regions' weights.
  """

  num_dropped: Array
  log_weights: Array


def aggregate_by_worst_regions(
  num_regions: int, rate: Scalar = 0.01
) -> optax.GradientTransformationExtraArgs:
  r"""Aggregates by regions whose weights follow the regions with the worst loss.

  Group-robust optimization by exponentiated gradient: it minimizes the largest
  loss among the regions. It helps where each region must do well; where one can't
  be learned (wrong labels), it takes all the weight: bound the steps, or use
  ``aggregate_by_regions``.

  .. math::
    q_r \leftarrow \frac{q_r \exp(\eta \ell_r)}{\sum_s q_s \exp(\eta \ell_s)},
    \qquad g = \frac{\sum_r q_r g_r}{\sum_r q_r}

  with the mean loss and the mean gradient of each region in the batch; a region
  without members in it keeps its weight, and counts for nothing in this step.

  Args:
    num_regions: the number of regions; a static Python integer.
    rate: eta, not negative. 0 keeps all weights equal.

  Extra args of ``update``:
    losses: ``float [n]``, each example's; ``value_and_grad`` hands them over.
    regions, region_weights: as in ``aggregate_by_regions``; the latter multiply
      the weights of the state.
    member_weights, num_dropped: as in ``aggregate_by_mean``.

  Shapes:
    ``[n, *shape]`` to ``[*shape]``. The state is a counter and one number for
    each region, so pass it: ``value_and_grad(...)(params, batch, state=state)``.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * ``rate=0`` is ``aggregate_by_regions``.
    * The weights follow the losses as the formula says.
    * The guarantees of ``aggregate_by_regions``.

  Raises:
    ValueError: for a negative rate, missing ``losses=``, losses that differ from
      device to device under ``jax.shard_map``, and as ``aggregate_by_regions``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_worst_regions(2, rate=jnp.log(3.0))
    >>> gradients = jnp.array([0.0, 0.0, 4.0])
    >>> gradient, state = jax.jit(step.update)(
    ...     gradients, step.init(gradients), regions=jnp.array([0, 0, 1]),
    ...     losses=jnp.array([1.0, 1.0, 2.0]))
    >>> print(f"{gradient:.4f}", jnp.exp(state.log_weights).round(4))  # 3 to 1
    3.0000 [0.25 0.75]

  References:
    Sagawa, Koh, Hashimoto, Liang, `Distributionally Robust Neural Networks for
    Group Shifts <https://arxiv.org/abs/1911.08731>`_, 2020, algorithm 1.
  """
  by_regions = aggregate_by_regions(num_regions)
  validate.in_range("rate", rate, 0, float("inf"), open_high=True)

  def init(params: PyTree) -> WorstRegionsState:
    del params
    equal = jnp.full([num_regions], -math.log(num_regions), jnp.float32)
    return WorstRegionsState(numerics.zero_count(), equal)

  def update(
    updates: PyTree,
    state: WorstRegionsState,
    params: PyTree = None,
    *,
    losses: Any = None,
    regions: Any = None,
    region_weights: Any = None,
    member_weights: Any = None,
    num_dropped: Any = None,
    **extra_args: Any,
  ) -> tuple[PyTree, WorstRegionsState]:
    del params, extra_args
    validate.state(state, WorstRegionsState, "aggregate_by_worst_regions")
    validate.given("losses", losses, "aggregate_by_worst_regions")
    validate.given("regions", regions, "aggregate_by_worst_regions")
    start = MemberState(state.num_dropped)
    members = present_members(updates, start, member_weights, num_dropped)
    if members is None:
      return updates, state
    n = members.weights.shape[0]
    validate.shape("losses", losses, (n,))
    validate.reduced("losses", losses, state.log_weights, "aggregate_by_worst_regions")
    losses = replicate(jnp.asarray(losses).astype(jnp.float32))
    weights = members.weights.astype(jnp.float32)
    usable = jnp.logical_and(weights > 0, jnp.isfinite(losses))
    ids = labels.fit("regions", regions)
    one_hot = jnp.arange(num_regions, dtype=jnp.int32)[:, None] == ids[None]
    share = jnp.where(jnp.logical_and(one_hot, usable[None]), weights[None], 0)
    known = jnp.where(usable, losses, jnp.zeros_like(losses))
    means = numerics.divide((share * known[None]).sum(axis=1), share.sum(axis=1))
    grown = state.log_weights + numerics.scalar(rate) * means
    log_weights = jax.nn.log_softmax(grown)
    # In units of the heaviest region at hand: none of them underflows alone.
    there = jnp.where(share.sum(axis=1) > 0, log_weights, -jnp.inf).max()
    total = jnp.exp(log_weights - jnp.where(there > -jnp.inf, there, 0))
    total = total.astype(members.weights.dtype)
    if region_weights is not None:
      total = total * jnp.asarray(region_weights).astype(total.dtype)
    reduced, _ = by_regions.update(
      members.updates,
      members.state,
      None,
      regions=regions,
      region_weights=total,
      member_weights=members.weights,
      num_dropped=0,
    )
    return reduced, WorstRegionsState(members.state.num_dropped, log_weights)

  return transformation(init, update)


def _largest(leaf: Array) -> Array:
  """The largest entry by magnitude along the leading axis; zero if it is empty."""
  if leaf.shape[0] == 0:
    return jnp.zeros(leaf.shape[1:], leaf.dtype)
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    index = jnp.abs(leaf).argmax(axis=0, keepdims=True)
    return jnp.take_along_axis(leaf, index, axis=0)[0]
  top, bottom = leaf.max(axis=0), leaf.min(axis=0)
  return jnp.where(top >= -bottom, top, bottom)
