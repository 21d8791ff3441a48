"""Step 3, masked: leaves out what contradicts the gradient."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import numerics
from optax_ranger._core import parts
from optax_ranger._core import replay
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.sharding import like
from optax_ranger._core.tree import all_finite
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import transformation

# Kept entries are divided by their share of the leaf, but at least by this.
_LEAST_SHARE = 1e-3


@states.exportable
class MaskState(NamedTuple):
  """The state of ``mask_contradictions``.

  Attributes:
    count: ``int32``, steps taken so far.
    num_skipped: ``int32``, updates skipped so far because an entry of the gradient,
      or its square in float32, was not finite.
    inner_state: the state of the inner optimizer.
  """

  count: Array
  num_skipped: Array
  inner_state: PyTree


def mask_contradictions(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  r"""Leaves out the entries of an update that contradict the gradient.

  This makes any optimizer with momentum a *cautious* one: an entry that goes up
  the gradient, because past gradients pointed the other way, is set to zero. The
  other entries of its leaf are scaled up, by the share of them that is left.

  .. math::
    \phi_i = [u_i \, g_i \le 0], \qquad
    u_i \leftarrow \frac{\phi_i \, u_i}{\max(\mathrm{mean}(\phi), 0.001)}

  where the mean is over a leaf; of one of at least 65,536 entries over an eighth
  of it or less, another part at each step. The published mask leaves out an entry whose
  gradient is zero too; here it is kept, or the rows of an embedding that a batch
  touches would be scaled up for all those that it doesn't.

  Args:
    inner: any optimizer whose updates are to be added to the parameters. Weight
      decay that is inside is masked as well; put ``optax.add_decayed_weights``
      after this step if it shall not be.

  Extra args of ``update``:
    Forwarded to ``inner``.

  Shapes:
    Any tree to the same tree, types kept. The state is ``inner``'s and two counters.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * No entry of an update has the sign of its gradient.
    * An update without a contradiction is that of ``inner``.
    * A non-finite gradient gives zeros and changes only a counter.

  Raises:
    ValueError: for gradients that differ from device to device under
      ``jax.shard_map``.
    TypeError: for parameters that hold integers, Python numbers or functions, for
      the state of another step, and for an ``inner`` whose state changes its
      structure, shapes or types.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> tx = ranger.mask_contradictions(optax.sgd(1.0, momentum=0.5))
    >>> state = tx.init(jnp.zeros(2))
    >>> _, state = tx.update(jnp.array([4.0, 1.0]), state)
    >>> update, state = tx.update(jnp.array([-1.0, 1.0]), state)
    >>> print(update)  # of -1.0 and -1.5, the first would go up; half is left
    [ 0. -3.]

  References:
    Liang et al., Cautious Optimizers: Improving Training with One Line of Code,
    2024, https://arxiv.org/abs/2411.16085, algorithm 1.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params: PyTree) -> MaskState:
    validate.parameters(params, "mask_contradictions")
    return MaskState(numerics.zero_count(), numerics.zero_count(), inner.init(params))

  def update(
    updates: PyTree,
    state: MaskState,
    params: PyTree = None,
    **extra_args: Any,
  ) -> tuple[PyTree, MaskState]:
    validate.state(state, MaskState, "mask_contradictions")
    validate.arrays("updates", updates, "mask_contradictions")
    same = jax.tree.map(lambda leaf: state.num_skipped, updates)
    validate.reduced("updates", updates, same, "mask_contradictions")
    # Finite entries may still have squares that overflow an inner moment.
    good = all_finite(updates, squares=True)
    nodes, inner_state = replay.guarded(
      lambda old: inner.update(updates, old, params, **extra_args),
      state.inner_state,
      good,
    )
    masked = lambda gradient, node: _masked(gradient, node, state.count, good)
    return jax.tree.map(masked, updates, nodes), MaskState(
      count=numerics.increment(state.count, good),
      num_skipped=numerics.increment(state.num_skipped, jnp.logical_not(good)),
      inner_state=inner_state,
    )

  return transformation(init, update)


def _masked(gradient: Array, node: replay.Node, count: Array, good: Array) -> Array:
  def kept(take):
    part = take(gradient)
    return _agrees(part, like(node.part(take), part))

  share = jnp.maximum(parts.mean(kept, gradient, count), _LEAST_SHARE)
  update = like(node.value, gradient)
  direction = jnp.where(_agrees(gradient, update), update, jnp.zeros_like(update))
  direction = direction.astype(numerics.wide(direction.dtype))
  return numerics.scaled(1 / share, direction, gradient.dtype, good)


def _agrees(gradient: Array, update: Array) -> Array:
  dtype = numerics.wide(update.dtype)
  product = _sign(gradient).astype(dtype) * jnp.conj(_sign(update).astype(dtype))
  return jnp.real(product) <= 0


def _sign(leaf: Array) -> Array:
  """The sign of real numbers, since the product of small ones is zero."""
  return jnp.sign(leaf) if jnp.isrealobj(leaf) else leaf
