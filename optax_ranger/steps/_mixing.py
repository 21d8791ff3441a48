"""Step 4, mixed: each member becomes the mean of its nearest, before an aggregator."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import gramian as gramian_lib
from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.members import init_members
from optax_ranger._core.members import keep_rows
from optax_ranger._core.members import present_members
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import transformation


def mix_nearest(
  aggregator: optax.GradientTransformation, num_corrupt: Scalar
) -> optax.GradientTransformationExtraArgs:
  r"""Averages each member with the members nearest to it, then aggregates.

  It is step 1, the averaging over neighbors, among gradients: members that differ
  by honest noise or by their data come together, and a corrupted member is either
  among the others, or far from them. It helps where honest members differ much, for
  which robust aggregators alone pay.

  .. math::
    g_i' = \frac{1}{n - f} \sum_{j \in \mathrm{nearest}_{n - f}(i)} g_j

  A member is the nearest to itself. Distances are of whole gradients.

  Args:
    aggregator: what comes after, such as ``aggregate_by_median()``. It is a
      wrapper, and no link of a chain, since an aggregator that looks at inner
      products needs those of the mixed members.
    num_corrupt: f, how many members may be corrupted, at least 0 and less than n.

  Extra args of ``update``:
    member_weights: as in ``aggregate_by_mean``. Members of weight zero are neither
      mixed nor counted in n.
    num_dropped: as in ``aggregate_by_mean``.
    gramian: as in ``aggregate_by_geometric_median``.
    Others are forwarded to `aggregator`, except ``norms`` and ``directions``.

  Shapes:
    ``[n, *shape]`` to what `aggregator` makes of it; the mixed members take as much
    memory as the members. The state is that of `aggregator`.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * ``num_corrupt=0`` gives all members their mean, so any aggregator is the mean.
    * A non-finite member is left out before others are mixed with it.
    * Permuting the members changes nothing.

  Raises:
    ValueError: for a count out of range or too large for n members, and as
      `aggregator`.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.mix_nearest(ranger.aggregate_by_median(), num_corrupt=1)
    >>> gradients = jnp.array([0.0, 1.0, 5.0, -900.0])
    >>> mixed, _ = jax.jit(step.update)(gradients, step.init(gradients))
    >>> print(mixed)  # the median of 2, 2, 2 and -299.7
    2.0

  References:
    Allouah et al., `Fixing by Mixing: A Recipe for Optimal Byzantine ML under
    Heterogeneity <https://arxiv.org/abs/2302.01772>`_, 2023, algorithm 2.
  """
  validate.count("num_corrupt", num_corrupt, least=0)
  aggregator = optax.with_extra_args_support(aggregator)

  def init(params: PyTree) -> PyTree:
    return aggregator.init(params)

  def update(
    updates: PyTree,
    state: PyTree,
    params: PyTree = None,
    *,
    member_weights: Any = None,
    num_dropped: Any = None,
    gramian: Any = None,
    **extra_args: Any,
  ) -> tuple[PyTree, PyTree]:
    # They would be those of the members before they are mixed.
    extra_args = {**extra_args, "norms": None, "directions": None}
    members = present_members(updates, init_members(None), member_weights, num_dropped)
    if members is None:
      return aggregator.update(updates, state, params, **extra_args)
    n, weights = members.weights.shape[0], members.weights
    if validate.is_known(num_corrupt) and num_corrupt >= n:
      raise ValueError(
        f"num_corrupt must be less than the number of members, n = {n}, got"
        f" {num_corrupt}."
      )
    dropped = members.state.num_dropped
    if gramian is None:
      frame, gramian = gramian_lib.of_members(members.updates, weights)
      far = (weights > 0).sum(dtype=jnp.int32) - (frame.weights > 0).sum(
        dtype=jnp.int32
      )
      weights, dropped = frame.weights, dropped + far
    validate.shape("gramian", gramian, (n, n))
    gramian = jnp.asarray(gramian).astype(weights.dtype)
    mixing = _mixing(gramian, weights > 0, num_corrupt)

    def mixed(leaf: Array) -> Array:
      wide = keep_rows(weights > 0, leaf).astype(numerics.wide(leaf.dtype))
      return _product(mixing.astype(wide.dtype), wide).astype(leaf.dtype)

    return aggregator.update(
      jax.tree.map(mixed, members.updates),
      state,
      params,
      member_weights=weights,
      num_dropped=dropped,
      gramian=_product(_product(mixing, gramian), mixing.T),
      **extra_args,
    )

  return transformation(init, update)


def _mixing(gramian: Array, there: Array, num_corrupt: Any) -> Array:
  """How much of each member the mixed ones hold, [n, n]; rows add up to one."""
  n = there.shape[0]
  usable = jnp.logical_and(there[:, None], there[None])
  squared = gramian_lib.squared_distances(gramian)
  # A member comes before others at the same place.
  itself = jnp.eye(n, dtype=bool)
  squared = jnp.where(usable, jnp.where(itself, -1, squared), jnp.inf)
  rank = jnp.argsort(jnp.argsort(squared, axis=1), axis=1).astype(jnp.int32)
  count = there.sum(dtype=jnp.int32) - jnp.asarray(num_corrupt).astype(jnp.int32)
  nearest = jnp.logical_and(usable, rank < jnp.maximum(count, 1))
  share = nearest.astype(gramian.dtype)
  return numerics.divide(share, share.sum(axis=1, keepdims=True))


def _product(a: Array, b: Array) -> Array:
  return jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
