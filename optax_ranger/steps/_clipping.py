"""Step 4, clipped: no example's gradient is longer than a norm."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import gramian
from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.members import clean_weights
from optax_ranger._core.sharding import per_row
from optax_ranger._core.sharding import replicate
from optax_ranger._core.tree import inner_product
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import transformation


@states.exportable
class ClipExamplesState(NamedTuple):
  """The state of ``clip_examples``.

  Attributes:
    norm: ``float32``, the norm that the next gradients are clipped to.
  """

  norm: Array


def clip_examples(
  norm: Scalar = 1.0,
  *,
  quantile: Scalar | None = None,
  rate: Scalar | None = 0.2,
  normalize: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Scales each example's gradient down to a norm, before an aggregation.

  No example moves the parameters further than others do: it helps against outliers
  and heavy tails. In ``value_and_grad`` and ``train_step`` the norms are computed in
  a first pass, some gradients at a time; the clipped gradients are never held.

  .. math::
    g_i \leftarrow \min(1, C / \lVert g_i \rVert) \, g_i, \qquad
    C \leftarrow C \exp(-\eta (b - q))

  where b is the share of the examples whose norm is at most C. Without a quantile, C
  stays as it is.

  This alone is no differential privacy. That would also need noise of the scale of
  C, batches drawn at random by a fixed chance, an accountant, and, with a quantile,
  noise on b; and no ``average_neighbors`` before it, by which one example reaches
  others.

  Args:
    norm: C, positive; with a quantile, where it starts.
    quantile: q in [0, 1]: C moves to where this share of the norms is below it.
    rate: :math:`\eta`, of that move, positive; or None: C is that quantile of this
      batch's norms. Before robust aggregators this is adaptive robust clipping (ARC),
      with :math:`q = 1 - 2 f (n - f) / n^2` for f corrupted members of n.
    normalize: whether gradients shorter than C are scaled up to it.

  Extra args of ``update``:
    member_weights: ``float [n]``, or None for ones: which examples count in b, and
      how much.
    norms: ``float [n]``, of the examples' whole gradients, for callers that hold a
      few leaves at a time. With them, the step is linear.

  Shapes:
    ``[n, *shape]`` to the same, types kept. The state is one number.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * No gradient comes out longer than the norm, but for rounding.
    * Without ``normalize``, gradients that are shorter do not change.
    * A non-finite gradient stays what it is, for the aggregation to drop, and does not
      enter the quantile.

  Raises:
    ValueError: for arguments out of range, and for leaves that differ in their
      leading axis.
    TypeError: for the state of another step.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> step = optax.chain(ranger.clip_examples(1.0), ranger.aggregate_by_mean())
    >>> gradients = jnp.array([[0.5, 0.0], [0.0, 20.0]])
    >>> clipped, _ = step.update(gradients, step.init(gradients))
    >>> print(clipped)
    [0.25 0.5 ]

  References:
    Abadi et al., `Deep Learning with Differential Privacy
    <https://arxiv.org/abs/1607.00133>`_, 2016, algorithm 1; Andrew et al.,
    `Differentially Private Learning with Adaptive Clipping
    <https://arxiv.org/abs/1905.03871>`_, 2019, section 2.1; Allouah et al.,
    `Adaptive Gradient Clipping for Robust Federated Learning
    <https://arxiv.org/abs/2405.14432>`_, 2024, algorithm 2.
  """
  validate.in_range("norm", norm, 0, float("inf"), open_low=True, open_high=True)
  if rate is not None:
    validate.in_range("rate", rate, 0, float("inf"), open_low=True, open_high=True)
  elif quantile is None:
    raise ValueError("rate=None needs quantile=, got None.")
  validate.choice("normalize", normalize, (True, False))
  if quantile is not None:
    validate.in_range("quantile", quantile, 0, 1)

  def init(params: PyTree) -> ClipExamplesState:
    del params
    return ClipExamplesState(numerics.scalar(norm))

  def update(
    updates: PyTree,
    state: ClipExamplesState,
    params: PyTree = None,
    *,
    member_weights: Any = None,
    norms: Any = None,
    **extra_args: Any,
  ) -> tuple[PyTree, ClipExamplesState]:
    del params, extra_args
    validate.state(state, ClipExamplesState, "clip_examples")
    n = validate.leading_axis("updates", updates)
    if n is None:
      return updates, state
    if norms is None:
      squares = jax.vmap(lambda row: inner_product(row, row))(updates)
      norms = replicate(jnp.sqrt(squares))
    else:
      validate.shape("norms", norms, (n,))
      norms = jnp.asarray(norms).astype(jnp.float32)
    usable = jnp.isfinite(norms)
    weights, _, _ = clean_weights(member_weights, n, jnp.float32, usable)
    if quantile is None:
      top = numerics.scalar(norm)
    elif rate is None:
      top = gramian.weighted_quantile(norms, weights, numerics.scalar(quantile))
    else:
      top = state.norm
    factors = numerics.divide(top, jnp.where(usable, norms, top))
    if not normalize:
      factors = jnp.where(norms > top, factors, jnp.ones_like(factors))
    factors = jnp.where(usable, factors, jnp.ones_like(factors))

    def scaled(leaf: Array) -> Array:
      wide = leaf.astype(numerics.wide(leaf.dtype))
      by_row = per_row(factors.astype(numerics.real(wide.dtype)), wide)
      return (by_row.astype(wide.dtype) * wide).astype(leaf.dtype)

    if quantile is not None:
      moved = top
      if rate is not None:
        below = jnp.where(norms <= top, weights, jnp.zeros_like(weights)).sum()
        share = numerics.divide(below, weights.sum())
        distance = share - numerics.scalar(quantile)
        moved = top * jnp.exp(-numerics.scalar(rate) * distance)
      good = jnp.logical_and(weights.sum() > 0, jnp.isfinite(moved))
      good = jnp.logical_and(good, moved > 0)
      state = ClipExamplesState(jnp.where(good, moved, state.norm))
    return jax.tree.map(scaled, updates), state

  return transformation(init, update)
