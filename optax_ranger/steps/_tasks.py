"""Step 4, tasks: one direction out of gradients that conflict."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import gramian
from optax_ranger._core import numerics
from optax_ranger._core import quadratic
from optax_ranger._core import validate
from optax_ranger._core.gramian import Directions
from optax_ranger._core.members import MemberState
from optax_ranger._core.members import combine
from optax_ranger._core.members import init_members
from optax_ranger._core.members import present_members
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import transformation


def aggregate_by_upgrad() -> optax.GradientTransformationExtraArgs:
  r"""Averages the tasks' gradients, each turned until it conflicts with none.

  A small enough step along the result increases no task's loss. Each gradient is
  projected onto the directions that all tasks agree to; the mean of these
  projections is the result. Where no gradients conflict, it is their mean.

  .. math::
    g = \sum_i m_i \Pi(g_i), \qquad
    \Pi(g_i) = \arg\min_{z: \langle z, g_j \rangle \ge 0 \, \forall j}
    \lVert z - g_i \rVert

  with the weights m scaled to a sum of one. A gradient that is zero, or less than
  2^-100 times the largest, counts in the mean, and constrains nothing.

  Extra args of ``update``:
    member_weights: ``float [n]``, how much each task counts; one of weight zero is
      absent.
    num_dropped: as in ``aggregate_by_mean``.
    directions: for callers that hold a few leaves at a time, a pair: the norms of
      the members' gradients, ``float [n]``, and the cosines of the angles between
      them, ``float [n, n]``, over all leaves. With it, the step is linear.

  Shapes:
    ``[n, *shape]`` to ``[*shape]``, types kept; temporaries are one leaf's members
    and n matrices of ``[n, n]``. Meant for up to some dozens of members. The state is
    one counter.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * No member's inner product with the result is below -1e-4 times the member's norm
      times the largest norm.
    * Gradients that do not conflict are averaged.
    * The guarantees of ``aggregate_by_mean``.

  Raises:
    ValueError: as ``aggregate_by_mean``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_upgrad()
    >>> gradients = jnp.array([[1.0, 0.0], [-2.0, 1.0]])
    >>> result, _ = jax.jit(step.update)(gradients, step.init(gradients))
    >>> print(jnp.abs(result - jnp.array([0.1, 0.7])).max() < 1e-5)
    True

  References:
    Quinton, Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024, definition 3.
  """

  def choose(found: Directions, weights: Array) -> Array:
    share = numerics.divide(weights, weights.sum())
    found = _without_tiny(found)
    matrix = _with_unit_diagonal(found)
    # Row i: how much of each direction the projection of direction i adds to it.
    added = jax.vmap(lambda column: quadratic.nonnegative(matrix, -column))(
      found.cosines
    )
    return share + _in_raw_units(share * found.norms @ added, found)

  return _by_directions(choose)


def aggregate_by_mgda() -> optax.GradientTransformationExtraArgs:
  r"""Replaces the tasks' gradients by the shortest vector among their means.

  No task's gradient has a smaller inner product with it than its squared norm, so
  all losses fall at the same rate at least. It is short where tasks conflict, and
  zero where one task is at its minimum: small gradients decide.

  .. math::
    g = \sum_i w_i g_i, \qquad
    w = \arg\min_{w \ge 0, \sum w = 1} \lVert \sum_i w_i g_i \rVert

  Extra args of ``update``:
    member_weights, num_dropped, directions: as in ``aggregate_by_upgrad``; of
      ``member_weights`` it matters only which are zero.

  Shapes:
    Those of ``aggregate_by_upgrad``, and one matrix of ``[n, n]``.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * No mean of the members has a norm that is smaller by more than 1e-4 of the
      largest member's.
    * The guarantees of ``aggregate_by_mean``.

  Raises:
    ValueError: as ``aggregate_by_mean``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_mgda()
    >>> gradients = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> result, _ = jax.jit(step.update)(gradients, step.init(gradients))
    >>> print(jnp.abs(result - jnp.array([0.4, 0.8])).max() < 1e-5)
    True

  References:
    Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective
    optimization, 2012; Sener, Koltun, `Multi-Task Learning as Multi-Objective
    Optimization <https://arxiv.org/abs/1810.04650>`_, 2018, equation 3.
  """

  def choose(found: Directions, weights: Array) -> Array:
    largest = found.norms.max(initial=0)
    scaled = found._replace(norms=numerics.divide(found.norms, largest))
    return _shortest_mean(scaled, weights > 0, jnp.zeros_like(found.norms))

  return _by_directions(choose)


def aggregate_by_cagrad(
  radius: Scalar = 0.5,
) -> optax.GradientTransformationExtraArgs:
  r"""Moves the mean of the tasks' gradients towards what the worst task gains from.

  Of all directions near the mean, it takes the one that the worst task likes best.
  It converges to a minimum of the mean loss, where ``aggregate_by_upgrad`` and
  ``aggregate_by_mgda`` stop at any point that no direction improves for all tasks.

  .. math::
    g = \arg\max_{d: \lVert d - \bar g \rVert \le c \lVert \bar g \rVert}
    \min_i \langle g_i, d \rangle

  Args:
    radius: c in [0, 1); 0 is the mean.

  Extra args of ``update``:
    member_weights, num_dropped, directions: as in ``aggregate_by_upgrad``; the
      weights are those of the mean.

  Shapes:
    Those of ``aggregate_by_mgda``; it solves some dozens of its problems.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * ``radius=0`` is ``aggregate_by_mean``.
    * The result is within ``radius`` times the norm of the mean from it.
    * The guarantees of ``aggregate_by_mean``.

  Raises:
    ValueError: for a radius out of range, and as ``aggregate_by_mean``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.aggregate_by_cagrad(0.5)
    >>> gradients = jnp.array([[4.0, 0.0], [-1.0, 1.0]])
    >>> result, _ = jax.jit(step.update)(gradients, step.init(gradients))
    >>> print((gradients @ gradients.mean(0)).min() < 0, (gradients @ result).min() > 0)
    True True

  References:
    Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
    <https://arxiv.org/abs/2110.14048>`_, 2021, equation 2.
  """
  validate.in_range("radius", radius, 0, 1, open_high=True)

  def choose(found: Directions, weights: Array) -> Array:
    there = weights > 0
    share = numerics.divide(weights, weights.sum())
    largest = found.norms.max(initial=0)
    scaled = found._replace(norms=numerics.divide(found.norms, largest))
    norm = lambda shares: _norm(scaled, shares)
    bound = numerics.scalar(radius, weights.dtype) * norm(share)

    # The result is g + J^T w / t, with the w of the mean of g_i + t g that has the
    # least norm, and the largest t for which |J^T w| >= t * bound, if there is one.
    def narrow(_, carry):
      low, high, _, _ = carry
      middle = jnp.sqrt(low * high)
      towards = _shortest_mean(scaled, there, middle * share)
      below = norm(towards) > middle * bound
      low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
      return low, high, middle, towards

    one = jnp.ones_like(bound)
    start = one * 2.0**-11, one * 2.0**20, one, share
    _, _, shift, towards = jax.lax.fori_loop(0, _BISECTIONS, narrow, start)
    length = jnp.minimum(1 / shift, numerics.divide(bound, norm(towards)))
    return share + length * towards

  return _by_directions(choose)


# Norms over the largest one's that count as zero.
_TINY = 2.0**-100
# Of the logarithm of the shift, from 2^-11 to 2^20. Smaller ones give the same result,
# but lose digits.
_BISECTIONS = 31


def _shortest_mean(found: Directions, there: Array, shift: Array) -> Array:
  """The weights of the mean of ``g_i + sum_j shift_j g_j`` with the least norm.

  The nonnegative w that minimizes ``|sum_i w_i g_i|^2 + (1 - sum w)^2`` differs from
  them by a factor; so does that of any positive weight of the second term.
  """
  products = found.cosines * found.norms[:, None] * found.norms[None]
  common = _product(products, shift)
  products = products + common[:, None] + common[None] + jnp.vdot(shift, common)
  squares = jnp.where(there, jnp.diagonal(products), 0)
  some = squares > 0
  least = jnp.where(some, squares, jnp.inf).min(initial=jnp.inf)
  least = jnp.where(jnp.isfinite(least), least, jnp.ones_like(least))
  scale = jnp.where(some, jax.lax.rsqrt(squares + least), 0)
  matrix = (products + least) * scale[:, None] * scale[None]
  matrix = matrix + jnp.diag(jnp.where(some, 0.0, 1.0).astype(scale.dtype))
  linear = numerics.divide(scale, scale.max(initial=0))
  weights = scale * quadratic.nonnegative(matrix, linear)
  weights = numerics.divide(weights, weights.sum())
  # A member that is zero is the shortest mean itself.
  zero = jnp.logical_and(there, jnp.logical_not(some))
  alone = numerics.divide(zero.astype(scale.dtype), zero.sum(dtype=scale.dtype))
  return jnp.where(zero.any(), alone, weights)


def _norm(found: Directions, shares: Array) -> Array:
  """The norm of a weighted sum of the members."""
  along = shares * found.norms
  return jnp.sqrt(jnp.maximum(jnp.vdot(along, _product(found.cosines, along)), 0))


def _with_unit_diagonal(found: Directions) -> Array:
  some = found.norms > 0
  return found.cosines + jnp.diag(jnp.where(some, 0.0, 1.0).astype(found.norms.dtype))


def _without_tiny(found: Directions) -> Directions:
  """Members that are nothing beside the largest, as zeros.

  To undo a conflict with one, its weight would have to be too large for float32.
  """
  there = found.norms > found.norms.max(initial=0) * _TINY
  both = jnp.logical_and(there[:, None], there[None])
  return Directions(
    jnp.where(there, found.norms, jnp.zeros_like(found.norms)),
    jnp.where(both, found.cosines, jnp.zeros_like(found.cosines)),
  )


def _in_raw_units(along: Array, found: Directions) -> Array:
  """Weights of gradients, from weights of their directions."""
  return numerics.divide(along, found.norms)


def _by_directions(
  choose: Callable[[Directions, Array], Array],
) -> optax.GradientTransformationExtraArgs:
  """A weighted sum whose weights depend on the members' lengths and angles alone."""

  def update(
    updates: PyTree,
    state: MemberState,
    params: PyTree = None,
    *,
    member_weights: Any = None,
    num_dropped: Any = None,
    directions: Any = None,
    **extra_args: Any,
  ) -> tuple[PyTree, MemberState]:
    del params, extra_args
    members = present_members(updates, state, member_weights, num_dropped)
    if members is None:
      return updates, state
    weights = members.weights
    own = directions is None
    if own:
      found = gramian.directions_of_members(members.updates, weights)
    else:
      found = _given(directions, weights)
    shares = choose(found, weights)
    shares = jnp.where(weights > 0, shares, jnp.zeros_like(shares))
    return combine(shares, members.updates, one_by_one=own), members.state

  return transformation(init_members, update)


def _given(directions: Any, weights: Array) -> Directions:
  """What the step is told, without members that are absent."""
  norms, cosines = directions
  n, there = weights.shape[0], weights > 0
  validate.shape("directions[0]", norms, (n,))
  validate.shape("directions[1]", cosines, (n, n))
  both = jnp.logical_and(there[:, None], there[None])
  keep = lambda keep, x: jnp.where(keep, jnp.asarray(x).astype(weights.dtype), 0)
  return Directions(keep(there, norms), keep(both, cosines))


def _product(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
