"""Step 5, parameters: run ahead, and return to a slow copy."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger import _numerics
from optax_ranger import _tree
from optax_ranger import _types
from optax_ranger import _validate


class LookaheadState(NamedTuple):
  """The state of ``smooth_by_lookahead``.

  Attributes:
    count: ``int32``, steps taken since the last synchronization. At zero, the
      parameters themselves are the slow copy, and `slow` may be out of date.
    slow: the slow parameters, in float32 or better.
  """

  count: _types.Array
  slow: _types.PyTree


def smooth_by_lookahead(
  every: Any = 6, step_size: Any = 0.5
) -> optax.GradientTransformationExtraArgs:
  r"""Lets the parameters run ahead, and pulls them back to a slow copy.

  Every so many steps the slow copy moves a part of the way to the parameters,
  and these return to it. Plain parameters go in and plain updates come out, so
  it drops into any loop, which ``optax.lookahead`` does not. Place it last in
  the chain, inside ``accumulate``: what comes after it would be lost at a
  return. Evaluate with the slow copy: ``eval_params(state, params)``.

  .. math::
    \phi &\leftarrow \phi + \alpha (\theta - \phi), \quad \theta \leftarrow \phi
    \qquad \text{every } k \text{ steps}

  Args:
    every: k, a whole number of at least 1; 1 only shortens every step.
    step_size: :math:`\alpha` in [0, 1]. 1 leaves the updates as they are; at 0
      every return is to the initial parameters.

  Shapes:
    Any tree to the same tree; updates keep their types. The state holds one
    copy of the parameters in float32 or better, with their shardings.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its ``update`` needs
    ``params``.

  Guarantees:
    * Fast and slow parameters are those of ``optax.lookahead``
      (``test_lookahead_equals_optax``).
    * ``step_size=1`` changes no iterate (``test_lookahead_of_whole_steps``).
    * The slow copy of half-precision parameters keeps what a rounded one would
      lose (``test_lookahead_of_half_precision_moves``).
    * An entry that is not finite leaves its slow copy alone
      (``test_lookahead_leaves_bad_entries_alone``).

  Raises:
    ValueError: for arguments out of range, and for a call without ``params``.
    TypeError: for parameters that hold integers.

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
    https://arxiv.org/abs/1907.08610, algorithm 1.
  """
  _validate.count("every", every)
  _validate.in_range("step_size", step_size, 0, 1)

  def init(params: _types.PyTree) -> LookaheadState:
    _validate.inexact_leaves("params", params, "smooth_by_lookahead")
    return LookaheadState(count=_numerics.zero_count(), slow=_tree.wide_copy(params))

  def update(
    updates: _types.PyTree,
    state: LookaheadState,
    params: _types.PyTree = None,
    **extra_args: Any,
  ) -> tuple[_types.PyTree, LookaheadState]:
    del extra_args
    _validate.given_params(params, "smooth_by_lookahead")
    return look_ahead(updates, state, params, every, step_size)

  return _types.transformation(init, update)


def look_ahead(
  updates: _types.PyTree,
  state: LookaheadState,
  params: _types.PyTree,
  every: Any,
  step_size: Any,
  advance: Any = True,
) -> tuple[_types.PyTree, LookaheadState]:
  """The update of ``smooth_by_lookahead``; nothing moves unless `advance`."""
  advance = jnp.asarray(advance)
  begin = state.count == 0
  full = state.count + 1 >= _numerics.scalar(every, jnp.int32)
  sync = jnp.logical_and(advance, full)
  rate = _numerics.scalar(step_size)

  # The slow copy is brought up to date when its next window begins: the
  # parameters are equal to it then, and it depends on no update. Writing it
  # together with the return would cost a buffer and twice the time.
  def refresh(slow: _types.Array, param: _types.Array) -> _types.Array:
    if slow.dtype != param.dtype:
      return slow
    return jnp.where(jnp.logical_and(begin, jnp.isfinite(param)), param, slow)

  def moved(
    slow: _types.Array, update: _types.Array, param: _types.Array
  ) -> _types.Array:
    new = _numerics.step_towards(slow, _applied(param, update), rate)
    return jnp.where(jnp.isfinite(new), new, slow)

  def pull(
    update: _types.Array, slow: _types.Array, param: _types.Array
  ) -> _types.Array:
    back = moved(slow, update, param) - param.astype(slow.dtype)
    return jnp.where(sync, back.astype(update.dtype), update)

  # Parameters that round their slow copy can't bring it up to date.
  def keep(
    slow: _types.Array, update: _types.Array, param: _types.Array
  ) -> _types.Array:
    if slow.dtype == param.dtype:
      return slow
    return jnp.where(sync, moved(slow, update, param), slow)

  slow = jax.tree.map(refresh, state.slow, params)
  count = jnp.where(full, jnp.zeros_like(state.count), state.count + 1)
  return jax.tree.map(pull, updates, slow, params), LookaheadState(
    count=jnp.where(advance, count, state.count),
    slow=jax.tree.map(keep, slow, updates, params),
  )


def _applied(param: _types.Array, update: _types.Array) -> _types.Array:
  """The parameter as ``optax.apply_updates`` makes it, rounding included."""
  wide = _numerics.wide(param.dtype)
  return (param.astype(wide) + update.astype(wide)).astype(param.dtype)
