"""Step 1: an example's gradient is averaged with those of its neighbors."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.members import MemberState
from optax_ranger._core.members import init_members
from optax_ranger._core.members import present_members
from optax_ranger._core.sharding import per_row
from optax_ranger._core.sharding import take_rows
from optax_ranger._core.types import Array
from optax_ranger._core.types import Neighbors
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import transformation
from optax_ranger.neighbors import _weights


def average_neighbors(
  *, include_self: bool = True, normalize: str | None = "batch"
) -> optax.GradientTransformationExtraArgs:
  r"""Averages each example's gradient with those of its nearest neighbors.

  It helps where labels are wrong: with weights that drop where labels disagree
  (``neighbors.weigh``), an example that its neighborhood does not back loses
  its weight. With plain uniform weights it is nearly a plain mean and gains
  nothing. It hurts where look-alikes rightly have different labels.

  .. math::
    g'_i = \gamma \, \big( s_i g_i + \textstyle\sum_j w_{ij} g_{N(i, j)} \big),
    \qquad s_i = \textstyle\sum_j w_{ij}

  Linear in the gradients, so ``value_and_grad`` fuses it into one ordinary
  backward pass.

  Args:
    include_self: False sets :math:`s_i = 0`: neighbors only.
    normalize: how :math:`\gamma` is chosen. ``"batch"``: the weights that the
      examples have in the sum of the results add up to the number of examples
      (to the sum of ``member_weights=``, when given), so that the learning rate
      keeps its meaning. ``"graph"``: a constant, one over the mean total weight
      of an example in the whole graph, which ``graph_weight=`` gives as the
      mean of ``weights.sum(axis=1)``. None: :math:`\gamma = 1`.

  Extra args of ``update``:
    neighbors: ``Neighbors`` with positions in this batch, ``[n, k]``. Negative
      indices are empty places. Those that are n or more are refused when they
      can be seen, and are empty places when they are traced.
    member_weights: ``float [n]`` or None. An example of weight zero is absent.
    graph_weight: a number, for ``normalize="graph"``.
    num_dropped: how many examples the caller has found not finite and given
      weight zero; without it, this step looks for itself.

  Shapes:
    ``[n, *shape]`` to ``[n, *shape]``, types kept, computed in float32 or
    better. The state is one counter; temporaries are one copy of the updates.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * If all other examples are neighbors of equal weight, then with ``"batch"`` the
      mean of the result is the plain mean.
    * Permuting the examples permutes the result.
    * A non-finite example, or one of weight zero, is no neighbor of another, and its
      row is zero. With ``"batch"`` the other rows are scaled up, so that the mean over
      all rows is the weighted mean over the finite ones.

  Raises:
    ValueError: for another ``normalize``, for missing ``neighbors=``, and for
      neighbors of another number of examples.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.average_neighbors(normalize=None)
    >>> gradients = jnp.array([1.0, 2.0, 6.0])
    >>> neighbors = ranger.Neighbors(
    ...     indices=jnp.array([[1], [0], [1]]),
    ...     distances=jnp.ones([3, 1]),
    ...     weights=jnp.array([[1.0], [1.0], [0.5]]),
    ... )
    >>> averaged, _ = jax.jit(step.update)(
    ...     gradients, step.init(gradients), neighbors=neighbors)
    >>> print(averaged)  # 1 + 2, 2 + 1, (6 + 2) / 2
    [3. 3. 4.]
  """
  validate.choice("normalize", normalize, ("batch", "graph", None))

  def update(
    updates: PyTree,
    state: MemberState,
    params: PyTree = None,
    *,
    neighbors: Neighbors | None = None,
    member_weights: Any = None,
    graph_weight: Any = None,
    num_dropped: Any = None,
    **extra_args: Any,
  ) -> tuple[PyTree, MemberState]:
    del params, extra_args
    if neighbors is None:
      how = ", for example with ranger.neighbors.nearest(...)"
      raise validate.MissingError("neighbors", "average_neighbors", how)
    if normalize == "graph":
      validate.given("graph_weight", graph_weight, "average_neighbors")
    members = present_members(updates, state, member_weights, num_dropped)
    if members is None:
      return updates, state
    indices, weights = _usable(neighbors, members.weights)
    own = weights.sum(axis=1)
    if not include_self:
      own = jnp.zeros_like(own)

    if normalize == "batch":
      rows = members.weights * (own + weights.sum(axis=1))
      scale = numerics.divide(members.declared, rows.sum())
    elif normalize == "graph":
      mean = numerics.scalar(graph_weight, own.dtype)
      scale = numerics.divide(jnp.ones_like(mean), mean * (1 + include_self))
    else:
      scale = jnp.ones([], own.dtype)

    def average(leaf: Array) -> Array:
      rows = leaf.astype(numerics.wide(leaf.dtype))
      start = per_row(own * scale, rows).astype(rows.dtype) * rows

      if rows.ndim == 1:  # As fusion asks: no larger than the weights.
        shares = (weights * scale).astype(rows.dtype)
        total = start + (shares * take_rows(rows, indices)).sum(axis=1)
        return total.astype(leaf.dtype)
      total = _weights.add_neighbors(start, rows, indices, weights * scale)
      return total.astype(leaf.dtype)

    return jax.tree.map(average, members.updates), members.state

  return transformation(init_members, update)


def _usable(neighbors: Neighbors, member_weights: Array) -> tuple[Array, Array]:
  """Indices within range, and weights that are zero wherever one is absent."""
  n = member_weights.shape[0]
  indices, weights = _weights.usable(neighbors, n, member_weights.dtype)
  validate.positions("neighbors.indices", neighbors.indices, n)
  alive = member_weights > 0
  usable = jnp.logical_and(alive[indices], alive[:, None])
  return indices, jnp.where(usable, weights, jnp.zeros_like(weights))
