"""Step 5: lookahead, with fast parameters that return to a slow copy."""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.sharding import like_tree
from optax_ranger._core.tree import unboxed
from optax_ranger._core.tree import wide_copy
from optax_ranger._core.tree import zeros_like
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import transformation


@states.exportable
class LookaheadState(NamedTuple):
  """The state of ``smooth_by_lookahead``.

  Attributes:
    count: ``int32``, steps taken since the last synchronization. At zero, the
      parameters themselves are the slow copy, and `slow` may be out of date.
    slow: the slow parameters, in float32 or better.
    velocity: v, in float32 or better; ``()`` without momentum.
    share: the weight of the slow parameters' last move, which `velocity` does not
      hold yet: the next step mixes it in; ``()`` without momentum.
  """

  count: Array
  slow: PyTree
  velocity: PyTree = ()
  share: PyTree = ()

  def smoothed_copy(self) -> tuple[Array, PyTree]:
    """The slow parameters, or all of the parameters at a synchronization."""
    return jnp.asarray(unboxed(self.count) == 0).astype(jnp.float32), self.slow


def smooth_by_lookahead(
  every: Scalar = 6, step_size: Scalar = 0.5, *, momentum: Scalar = 0.0
) -> optax.GradientTransformationExtraArgs:
  r"""Lets the parameters run ahead, and pulls them back to a slow copy.

  Every so many steps the slow copy moves a part of the way to the parameters,
  and these return to it. Plain parameters go in and plain updates come out, so
  it drops into any loop, which ``optax.lookahead`` does not. Place it last in
  the chain, inside ``accumulate``: what comes after it would be lost at a
  return. Evaluate with the slow copy: ``eval_params(state, params)``.

  .. math::
    v &\leftarrow \mu v + \alpha (\theta - \phi) \\
    \phi &\leftarrow \phi + \alpha (\theta - \phi) + \mu v, \quad
    \theta \leftarrow \phi \qquad \text{every } k \text{ steps}

  Args:
    every: k, a whole number of at least 1; 1 without momentum only shortens every
      step.
    step_size: :math:`\alpha` in [0, 1]. Without momentum 1 leaves the updates as
      they are. At 0 every return is to the initial parameters.
    momentum: :math:`\mu` in [0, 1), Nesterov's, of the slow copy (SNOO). The
      number 0 is none and holds no velocity. ``optax.inject_hyperparams`` traces
      it, and holds one, unless it is named in ``static_args``.

  Shapes:
    Any tree to the same tree; updates keep their types. The state holds one
    copy of the parameters in float32 or better, with their shardings; with
    momentum two.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its ``update`` needs
    ``params``.

  Guarantees:
    * Without momentum, fast and slow parameters are those of ``optax.lookahead``.
    * With momentum, the slow copy moves as by SGD with Nesterov momentum.
    * A non-finite entry does not change its slow copy.

  Raises:
    ValueError: for arguments out of range, for a call without ``params``, for
      updates or parameters unlike those that ``init`` was given, and for a
      momentum with the state of a step without.
    TypeError: for parameters that hold integers, Python numbers or functions, for
      abstract ones, and for the state of another step.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> tx = optax.chain(optax.sgd(1.0), ranger.smooth_by_lookahead(2, 0.5))
    >>> params = jnp.array(0.0)
    >>> state = tx.init(params)
    >>> for _ in range(2):  # to 1, then to 2, and half of the way back
    ...   updates, state = tx.update(jnp.array(-1.0), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(params, ranger.eval_params(state, params))
    1.0 0.0
    1.0 1.0

  References:
    Zhang et al., Lookahead Optimizer: k steps forward, 1 step back, 2019,
    https://arxiv.org/abs/1907.08610, algorithm 1; Kallusky et al., SNOO: Step-K
    Nesterov Outer Optimizer, 2025, https://arxiv.org/abs/2510.15830.
  """
  validate.count("every", every)
  validate.in_range("step_size", step_size, 0, 1)
  validate.in_range("momentum", momentum, 0, 1, open_high=True)
  known = isinstance(momentum, (int, float, np.number, np.ndarray))
  without = known and momentum == 0

  def init(params: PyTree) -> LookaheadState:
    validate.parameters(params, "smooth_by_lookahead", copied=True)
    state = LookaheadState(count=numerics.zero_count(), slow=wide_copy(params))
    if without:
      return state
    return state._replace(
      velocity=zeros_like(state.slow),
      share=jnp.zeros([], numerics.widest_real(state.slow)),
    )

  def update(
    updates: PyTree,
    state: LookaheadState,
    params: PyTree = None,
    **extra_args: Any,
  ) -> tuple[PyTree, LookaheadState]:
    del extra_args
    validate.given_params(params, "smooth_by_lookahead")
    validate.state(state, LookaheadState, "smooth_by_lookahead")
    validate.same_tree("updates", updates, state.slow, "smooth_by_lookahead")
    validate.same_tree("params", params, state.slow, "smooth_by_lookahead")
    if not (without or _has_velocity(state)):
      raise ValueError(
        "smooth_by_lookahead with momentum needs a state with a velocity, got one"
        " that was made without momentum: start with tx.init(params)."
      )
    return look_ahead(updates, state, params, every, step_size, momentum=momentum)

  return transformation(init, update)


def look_ahead(
  updates: PyTree,
  state: LookaheadState,
  params: PyTree,
  every: Any,
  step_size: Any,
  advance: Any = True,
  *,
  momentum: Any = 0.0,
) -> tuple[PyTree, LookaheadState]:
  """The update of ``smooth_by_lookahead``; nothing moves unless `advance`."""
  given, updates = updates, like_tree(updates, state.slow)
  params = like_tree(params, state.slow)
  advance = jnp.asarray(advance)
  begin = state.count == 0
  full = state.count + 1 >= numerics.scalar(every, jnp.int32)
  sync = jnp.logical_and(advance, full)

  # The slow copy is updated when its next window begins: the parameters are
  # equal to it then, and it depends on no update. Writing it at the end of a
  # window would cost a buffer and twice the time. The velocity v is updated
  # too, from the slow copy's move, (1 + momentum) v - momentum * old v.
  def gather(velocity: Array, slow: Array, param: Array) -> Array:
    if slow.dtype != param.dtype:
      return velocity
    new = numerics.step_towards(velocity, param - slow, state.share)
    return jnp.where(jnp.logical_and(begin, jnp.isfinite(new)), new, velocity)

  # The velocity is always finite. To look at it orders the two passes: else XLA
  # keeps a copy of the old slow parameters for it.
  def refresh(slow: Array, param: Array, *velocity: Array) -> Array:
    if slow.dtype != param.dtype:
      return slow
    good = functools.reduce(jnp.logical_and, map(jnp.isfinite, (param, *velocity)))
    return jnp.where(jnp.logical_and(begin, good), param, slow)

  def moved(slow: Array, update: Array, param: Array, *velocity: Array) -> Array:
    ahead = _applied(param, update).astype(slow.dtype)
    move = numerics.scalar(step_size, slow.dtype) * (ahead - slow)
    for v in velocity:
      decay = numerics.scalar(momentum, v.dtype)
      move = move + decay * (decay * v + move)
    new = slow + move
    return jnp.where(jnp.isfinite(new), new, slow)

  def pull(update: Array, slow: Array, param: Array, *velocity: Array) -> Array:
    back = moved(slow, update, param, *velocity) - param.astype(slow.dtype)
    return jnp.where(sync, back.astype(update.dtype), update)

  # Lower-precision parameters can't update their slow copy.
  def keep(slow: Array, update: Array, param: Array, *velocity: Array) -> Array:
    if slow.dtype == param.dtype:
      return slow
    return jnp.where(sync, moved(slow, update, param, *velocity), slow)

  def keep_velocity(velocity: Array, kept: Array, slow: Array, param: Array) -> Array:
    if slow.dtype == param.dtype:
      return velocity
    new = numerics.step_towards(velocity, kept - slow, share)
    return jnp.where(jnp.logical_and(sync, jnp.isfinite(new)), new, velocity)

  velocity: tuple[PyTree, ...] = ()
  share: Any = ()
  if _has_velocity(state):
    share = 1 / (1 + numerics.scalar(momentum, state.share.dtype))
    velocity = (like_tree(state.velocity, state.slow),)
    velocity = (jax.tree.map(gather, *velocity, state.slow, params),)
  slow = jax.tree.map(refresh, state.slow, params, *velocity)
  count = jnp.where(full, jnp.zeros_like(state.count), state.count + 1)
  ahead = jax.tree.map(pull, updates, slow, params, *velocity)
  new_state = state._replace(
    count=jnp.where(advance, count, state.count),
    slow=jax.tree.map(keep, slow, updates, params, *velocity),
  )
  if velocity:
    kept = jax.tree.map(keep_velocity, *velocity, new_state.slow, slow, params)
    new_state = new_state._replace(
      velocity=like_tree(kept, state.velocity),
      share=jnp.where(sync, share, jnp.zeros_like(share)),
    )
  return like_tree(ahead, given), new_state


def _has_velocity(state: LookaheadState) -> bool:
  return not isinstance(state.share, tuple)


def _applied(param: Array, update: Array) -> Array:
  """The parameter as ``optax.apply_updates`` makes it, rounding included."""
  wide = numerics.wide(param.dtype)
  return (param.astype(wide) + update.astype(wide)).astype(param.dtype)
