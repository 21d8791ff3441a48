"""Step 4, robust: medians, trimmed mean, geometric median, Krum."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import gramian as gramian_lib
from optax_ranger._core import numerics
from optax_ranger._core import sorting
from optax_ranger._core import validate
from optax_ranger._core.members import Members
from optax_ranger._core.members import MemberState
from optax_ranger._core.members import aggregator
from optax_ranger._core.members import combine
from optax_ranger._core.members import gather_rows
from optax_ranger._core.members import init_members
from optax_ranger._core.members import present_members
from optax_ranger._core.platforms import for_one_cpu
from optax_ranger._core.sharding import is_sharded
from optax_ranger._core.sharding import per_row
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import transformation


def aggregate_by_median() -> optax.GradientTransformationExtraArgs:
  r"""Replaces the members' gradients, entry by entry, by their weighted median.

  The value with half of the weight on either side; where exactly half lies on
  each side of a gap, the middle of the gap. It helps when some members are
  wrong; with honest ones that are skewed, it differs from their mean.

  Extra args of ``update``:
    member_weights, num_dropped: as in ``aggregate_by_mean``.

  Shapes:
    ``[n, *shape]`` to ``[*shape]``, types kept. Members are sorted leaf by
    leaf, which takes twice a leaf's members in float32 or better, or less: inside of
    jit on a CPU, up to 32 members take half of that. Real and imaginary parts
    are taken apart. The state is one counter.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * Breakdown point 1/2: while less than half of the weight is corrupted, each entry
      is within the range of the honest members' entries. From half on, it can be
      anywhere.
    * The guarantees of ``aggregate_by_mean``.

  Raises:
    ValueError: as ``aggregate_by_mean``.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_median()
    >>> gradients = jnp.array([1.0, 2.0, -900.0])
    >>> median, _ = step.update(gradients, step.init(gradients))
    >>> print(median)
    1.0
  """

  def share(lower, upper, total, room):
    return jnp.where(
      jnp.logical_and(lower <= total / 2 + room, upper >= total / 2 - room),
      jnp.ones_like(upper),
      jnp.zeros_like(upper),
    )

  return aggregator(lambda members: _sorted_mean(members, share), one_by_one=True)


def aggregate_by_trimmed_mean(
  fraction: Scalar,
) -> optax.GradientTransformationExtraArgs:
  r"""Leaves out the lowest and the highest entries, and averages the others.

  Entry by entry, the members are sorted, and those parts of them count that lie
  between the shares ``fraction`` and ``1 - fraction`` of the total weight: a
  member on an edge counts in part.

  .. math::
    g = \frac{\sum_i o_i \, g_{(i)}}{\sum_i o_i}, \qquad
    o_i = \bigl| [M_{i-1}, M_i] \cap [f M, (1 - f) M] \bigr|, \quad
    M_i = \sum_{j \le i} m_{(j)}

  Args:
    fraction: f, the share of the weight to leave out *per side*, in [0, 0.5).
      0 is the mean; near 0.5, it is the median.

  Extra args of ``update``:
    member_weights, num_dropped: as in ``aggregate_by_mean``.

  Shapes:
    Those of ``aggregate_by_median``.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * Breakdown point ``fraction``: while at most that share of the weight is corrupted,
      each entry is within the range of the honest members' entries. With more, it can
      be anywhere.
    * ``fraction=0`` is ``aggregate_by_mean``.
    * The guarantees of ``aggregate_by_mean``.

  Raises:
    ValueError: for a fraction outside of [0, 0.5), and as ``aggregate_by_mean``.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_trimmed_mean(0.25)
    >>> gradients = jnp.array([1.0, 3.0, 2.0, -900.0])
    >>> mean, _ = step.update(gradients, step.init(gradients))
    >>> print(mean)  # of 1 and 2
    1.5
  """
  validate.in_range("fraction", fraction, 0, 0.5, open_high=True)

  def share(lower, upper, total, room):
    low = numerics.scalar(fraction, total.dtype) * total
    width = jnp.minimum(upper, total - low) - jnp.maximum(lower, low)
    # What rounding leaves of a member at the edge must not count at all.
    return jnp.where(width > room, width, jnp.zeros_like(width))

  return aggregator(lambda members: _sorted_mean(members, share), one_by_one=True)


def aggregate_by_geometric_median(
  rounds: Scalar = 32, smoothing: Scalar = 1e-3
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces the members' gradients by the point nearest to all of them.

  Distances are of whole gradients, not of entries, and are not squared, so that
  a member pulls equally hard wherever it is. Smoothed Weiszfeld, a fixed number
  of rounds, on the members' inner products alone; the result is a weighted mean
  of the members.

  .. math::
    g = \arg\min_z \sum_i m_i \lVert g_i - z \rVert, \qquad
    z \leftarrow \frac{\sum_i \beta_i g_i}{\sum_i \beta_i}, \quad
    \beta_i = \frac{m_i}{\max(\nu, \lVert g_i - z \rVert)}

  Args:
    rounds: how many, at least 1; each costs n squared, whatever the parameters.
    smoothing: nu, in units of the median distance from the member of median
      size, positive. A large one is the mean.

  Extra args of ``update``:
    member_weights, num_dropped: as in ``aggregate_by_mean``.
    gramian: ``float [n, n]``, for callers that hold a few leaves at a time: the
      members' inner products over all leaves, around any center that is a mean
      of them. With it, the step is linear.

  Shapes:
    ``[n, *shape]`` to ``[*shape]``, types kept; temporaries are one leaf's
    members. The state is one counter.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * Breakdown point 1/2: while less than half of the weight is corrupted, the distance
      to the honest members is bounded, however far the corrupted ones are. With more,
      the result can be anywhere.
    * A member whose largest entry is 2^40 times the median member's is absent, as one
      that is not finite is.
    * The guarantees of ``aggregate_by_mean``.

  Raises:
    ValueError: for arguments out of range, and as ``aggregate_by_mean``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_geometric_median()
    >>> gradients = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [900.0, 900.0]])
    >>> median, _ = jax.jit(step.update)(gradients, step.init(gradients))
    >>> print(jnp.abs(median - 0.5).max() < 0.01)  # between the second and third
    True

  References:
    Pillutla, Kakade, Harchaoui, `Robust Aggregation for Federated Learning
    <https://arxiv.org/abs/1912.13445>`_, 2019, algorithm 2.
  """
  validate.count("rounds", rounds)
  validate.in_range(
    "smoothing", smoothing, 0, float("inf"), open_low=True, open_high=True
  )

  def choose(gramian: Array, weights: Array) -> Array:
    squares = jnp.maximum(jnp.diagonal(gramian), 0)
    away = jnp.logical_and(weights > 0, squares > 0)
    typical = gramian_lib.weighted_quantile(
      jnp.sqrt(squares), jnp.where(away, weights, jnp.zeros_like(weights))
    )
    floor = numerics.scalar(smoothing, weights.dtype) * typical
    floor = jnp.maximum(floor, jnp.finfo(floor.dtype).tiny)

    def pulled(distances):
      pull = weights * (floor / jnp.maximum(distances, floor))
      return numerics.divide(pull, pull.sum())

    def one_round(_, shares):
      products = _product(gramian, shares)
      squared = squares - 2 * products + _product(shares, products)
      return pulled(jnp.sqrt(jnp.maximum(squared, jnp.zeros_like(squared))))

    # The center may be a member: near it, the first round would hardly move.
    start = pulled(jnp.maximum(jnp.sqrt(squares), typical))
    return jax.lax.fori_loop(1, jnp.asarray(rounds).astype(jnp.int32), one_round, start)

  return _by_inner_products(choose)


def aggregate_by_krum(
  num_corrupt: Scalar, num_selected: Scalar = 1
) -> optax.GradientTransformationExtraArgs:
  r"""Averages the members that lie in the midst of their nearest others.

  A member's score is the sum of its squared distances to the n - f - 2 others
  nearest to it; those with the least scores are selected. Distances are of whole
  gradients, over all leaves.

  .. math::
    s_i = \sum_{j \in \mathrm{nearest}_{n - f - 2}(i)} \lVert g_i - g_j \rVert^2

  Args:
    num_corrupt: f, how many members may lie, at least 0; n must be at least
      2 f + 3.
    num_selected: how many to average, in [1, n - f]; 1 is Krum, more multi-Krum.

  Extra args of ``update``:
    member_weights, num_dropped: as in ``aggregate_by_mean``; the selected
      members are averaged with their weights, and those of weight zero are no
      members, so that n is less. Scores do not know weights.
    gramian: as in ``aggregate_by_geometric_median``.

  Shapes:
    Those of ``aggregate_by_geometric_median``.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * With at most ``num_corrupt`` corrupted members, each selected member is within
      :math:`\sqrt{n - f - 2}` times the diameter of the honest members of an honest
      one. With n - f - 1 corrupted members that agree, the result can be anywhere.
    * ``num_corrupt=0, num_selected=n`` is ``aggregate_by_mean``.
    * The guarantees of ``aggregate_by_mean``.

  Raises:
    ValueError: for counts out of range or too large for n members, and as
      ``aggregate_by_mean``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_krum(num_corrupt=1)
    >>> gradients = jnp.array([1.0, 2.0, 3.5, 5.5, -900.0])
    >>> selected, _ = jax.jit(step.update)(gradients, step.init(gradients))
    >>> print(selected)  # 1 + 1.5 squared is the least sum of n - f - 2 = 2
    2.0

  References:
    Blanchard, El Mhamdi, Guerraoui, Stainer, `Machine Learning with Adversaries:
    Byzantine Tolerant Gradient Descent <https://arxiv.org/abs/1703.02757>`_,
    2017, section 4.
  """
  validate.count("num_corrupt", num_corrupt, least=0)
  validate.count("num_selected", num_selected)

  def choose(gramian: Array, weights: Array) -> Array:
    n = weights.shape[0]
    if validate.is_known(num_corrupt):
      if n < 2 * num_corrupt + 3:
        raise ValueError(
          f"aggregate_by_krum needs n >= 2 num_corrupt + 3 members, got n = {n}"
          f" and num_corrupt = {num_corrupt}."
        )
      if validate.is_known(num_selected) and num_selected > n - num_corrupt:
        raise ValueError(
          "num_selected must be at most n - num_corrupt ="
          f" {n - int(num_corrupt)}, got {num_selected}."
        )
    there = weights > 0
    squared = gramian_lib.squared_distances(gramian)
    usable = jnp.logical_and(there[:, None], there[None])
    usable = jnp.logical_and(usable, jnp.logical_not(jnp.eye(n, dtype=bool)))
    squared = jnp.sort(jnp.where(usable, squared, jnp.inf), axis=1)
    nearest = there.sum(dtype=jnp.int32) - jnp.asarray(num_corrupt).astype(jnp.int32)
    taken = jnp.arange(n, dtype=jnp.int32) < jnp.maximum(nearest - 2, 1)
    scores = jnp.where(taken[None], squared, jnp.zeros_like(squared)).sum(axis=1)
    # The absent come last, also after members whose sum overflows.
    scores = jnp.minimum(scores, jnp.finfo(scores.dtype).max)
    order = jnp.argsort(jnp.where(there, scores, jnp.inf))
    rank = jnp.argsort(order)
    selected = rank < jnp.asarray(num_selected).astype(rank.dtype)
    chosen = jnp.where(selected, weights, jnp.zeros_like(weights))
    return numerics.divide(chosen, chosen.sum())

  return _by_inner_products(choose)


def _by_inner_products(
  choose: Callable[[Array, Array], Array],
) -> optax.GradientTransformationExtraArgs:
  """A weighted mean whose weights depend on the members' inner products alone."""

  def update(
    updates: PyTree,
    state: MemberState,
    params: PyTree = None,
    *,
    member_weights: Any = None,
    num_dropped: Any = None,
    gramian: Any = None,
    **extra_args: Any,
  ) -> tuple[PyTree, MemberState]:
    del params, extra_args
    members = present_members(updates, state, member_weights, num_dropped)
    if members is None:
      return updates, state
    n, weights, state = members.weights.shape[0], members.weights, members.state
    own = gramian is None
    if own:
      frame, gramian = gramian_lib.of_members(updates, weights)
      num_far = (weights > 0).sum() - (frame.weights > 0).sum()
      state = MemberState(numerics.increment(state.num_dropped, num_far))
      weights = frame.weights
    validate.shape("gramian", gramian, (n, n))
    shares = choose(jnp.asarray(gramian).astype(weights.dtype), weights)
    return combine(shares, updates, one_by_one=own), state

  return transformation(init_members, update)


def _sorted_mean(
  members: Members,
  share: Callable[..., Array],
) -> Callable[[Array], Array]:
  """A mean over sorted members, each with the share that its place gives it.

  `share` gets where a member's weight begins and ends along the sorted weights,
  the total, and how much of it is rounding.
  """
  total = members.weights.sum()
  room = total * (members.weights.shape[0] * jnp.finfo(total.dtype).eps)

  def of_reals(leaf: Array) -> Array:
    there = per_row(members.weights > 0, leaf)
    values = jnp.where(there, leaf, jnp.full_like(leaf, jnp.inf))
    weights = per_row(members.weights, leaf).astype(leaf.dtype)
    weights = jnp.broadcast_to(weights, leaf.shape, out_sharding=_layout(leaf))

    def add(carry, row):
      mean, lower, counted = carry
      value, weight = row
      upper = lower + weight
      part = share(lower, upper, total.astype(leaf.dtype), room.astype(leaf.dtype))
      part = jnp.where(weight > 0, part, jnp.zeros_like(part))
      counted = counted + part
      # A running mean: a sum of large numbers could overflow.
      ratio = numerics.divide(part, counted)
      value = jnp.where(part > 0, value, jnp.zeros_like(value))
      return (mean * (1 - ratio) + value * ratio, upper, counted), None

    def by_network(start, values, weights):
      for row in zip(*sorting.sort_rows([*values], [*weights]), strict=True):
        start, _ = add(start, row)
      return start[0]

    def by_sort(start, values, weights):
      rows = jax.lax.sort((values, weights), dimension=0, num_keys=1)
      return jax.lax.scan(add, start, rows)[0][0]

    zeros = jnp.zeros_like(leaf[0]) if leaf.shape[0] else jnp.zeros(leaf.shape[1:])
    zeros = zeros.astype(leaf.dtype)
    few = leaf.shape[0] <= sorting.MOST_ROWS
    mean = for_one_cpu(leaf, by_network, by_sort) if few else by_sort
    return mean((zeros, zeros, zeros), values, weights)

  def of_leaf(leaf: Array) -> Array:
    leaf = gather_rows(leaf.astype(numerics.wide(leaf.dtype)))
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
      return jax.lax.complex(of_reals(jnp.real(leaf)), of_reals(jnp.imag(leaf)))
    return of_reals(leaf)

  return of_leaf


def _layout(leaf: Array) -> Any:
  return jax.typeof(leaf).sharding.spec if is_sharded(leaf) else None


def _product(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
