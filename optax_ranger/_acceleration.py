"""Step 3, NGS: Nesterov gradient scaling with a learned acceleration factor."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger import _numerics
from optax_ranger import _tree
from optax_ranger import _types
from optax_ranger import _validate


class NgsState(NamedTuple):
  """The state of ``scale_by_ngs``.

  Attributes:
    count: ``int32``, steps taken so far.
    num_skipped: ``int32``, updates skipped so far because the gradient, or its
      squared norm in float32, was not finite.
    acceleration: ``float32``, the learned factor.
    momentum_norm: ``float32``, the squared norm of the momentum.
    momentum: the sum of past gradients, decayed.
  """

  count: _types.Array
  num_skipped: _types.Array
  acceleration: _types.Array
  momentum_norm: _types.Array
  momentum: _types.PyTree


def scale_by_ngs(
  momentum: Any = 0.9,
  *,
  acceleration: Any = 1.0,
  hyper_rate: Any = 0.1,
  bounds: tuple[Any, Any] = (1e-3, 1e3),
) -> optax.GradientTransformationExtraArgs:
  r"""Scales Nesterov's direction with an acceleration factor learned on the way.

  The factor grows while the gradient agrees with the momentum and shrinks when
  it turns against it, so the learning rate may start decades too small. It
  costs one multiplication and two inner products. Where gradients are mostly
  noise, the cosine is near zero and the factor stays about where it is.

  .. math::
    a_t &= \mathrm{clip}\big(a_{t-1} \exp(\beta \cos(g_t, m_{t-1})), lo, hi\big) \\
    m_t &= \mu m_{t-1} + g_t \\
    u_t &= a_t \, (g_t + \mu m_t)

  Args:
    momentum: :math:`\mu` in [0, 1). 0 is plain gradient descent, and then only
      the last gradient's agreement with this one counts.
    acceleration: :math:`a_0`, positive; at most ``bounds[1]`` and at least
      ``bounds[0]``.
    hyper_rate: :math:`\beta`, not negative; 0 keeps the factor fixed. The
      factor changes by at most :math:`e^{\pm\beta}` a step.
    bounds: :math:`(lo, hi)`, positive.

  Shapes:
    Any tree to the same tree, types kept. The state holds the momentum, of the
    parameters' size in float32 or better, and four scalars.

  Returns:
    An ``optax.GradientTransformationExtraArgs``. Read the factor with
    ``optax.tree.get(state, "acceleration")``.

  Guarantees:
    * ``hyper_rate=0`` equals ``optax.sgd`` with Nesterov momentum, times the
      acceleration (``test_no_hyper_rate_is_nesterov_sgd``).
    * The factor is positive, finite and within bounds, whatever comes
      (``test_acceleration_stays_within_bounds``).
    * A gradient that is not finite gives zeros and changes nothing but a
      counter (``test_nothing_poisons``).
    * The factor does not depend on the gradient's unit, as long as the squared
      norm is neither zero nor infinite in float32
      (``test_acceleration_is_scale_free``).

  Raises:
    ValueError: for arguments out of range, and for gradients that differ from
      device to device under ``jax.shard_map``.
    TypeError: for parameters that hold integers.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> step = ranger.scale_by_ngs(0.5, hyper_rate=0.1)
    >>> gradient = jnp.array(1.0)
    >>> state = step.init(gradient)
    >>> _, state = step.update(gradient, state)  # no momentum yet: cosine 0
    >>> update, state = step.update(gradient, state)  # cosine 1
    >>> print(f"{optax.tree.get(state, 'acceleration'):.4f}")
    1.1052
    >>> print(f"{update:.4f}")  # exp(0.1) * (1 + 0.5 * 1.5)
    1.9340

  References:
    Baydin et al., Online Learning Rate Adaptation with Hypergradient Descent,
    2018, https://arxiv.org/abs/1703.04782, equations 7 and 8 (SGDN-HD); here
    multiplicative, bounded and free of scale.
  """
  _validate.in_range("momentum", momentum, 0, 1, open_high=True)
  _validate.in_range("hyper_rate", hyper_rate, 0, float("inf"), open_high=True)
  low, high = bounds
  for name, value in (("bounds[0]", low), ("bounds[1]", high)):
    _validate.in_range(name, value, 0, float("inf"), open_low=True, open_high=True)
  if _validate.is_known(low) and _validate.is_known(high):
    _validate.in_range("bounds[0]", low, 0, float(high))
    _validate.in_range("acceleration", acceleration, float(low), float(high))

  def init(params: _types.PyTree) -> NgsState:
    _validate.inexact_leaves("params", params, "scale_by_ngs")
    return NgsState(
      count=_numerics.zero_count(),
      num_skipped=_numerics.zero_count(),
      acceleration=_numerics.scalar(acceleration),
      momentum_norm=jnp.zeros([], jnp.float32),
      momentum=jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=_numerics.wide(p.dtype)), params
      ),
    )

  def update(
    updates: _types.PyTree,
    state: NgsState,
    params: _types.PyTree = None,
    **extra_args: Any,
  ) -> tuple[_types.PyTree, NgsState]:
    del params, extra_args
    _validate.reduced("updates", updates, state.momentum, "scale_by_ngs")
    decay = _numerics.scalar(momentum)
    agreement = _tree.inner_product(updates, state.momentum)
    norm = _tree.inner_product(updates, updates)
    # |m|^2 by recurrence: a third reduction would be a third pass.
    momentum_norm = decay * decay * state.momentum_norm + 2 * decay * agreement + norm
    momentum_norm = jnp.maximum(momentum_norm, jnp.zeros_like(norm))
    good = jnp.isfinite(norm) & jnp.isfinite(momentum_norm)

    cosine = _numerics.divide(agreement, jnp.sqrt(norm) * jnp.sqrt(state.momentum_norm))
    cosine = jnp.clip(jnp.where(good, cosine, jnp.zeros_like(cosine)), -1, 1)
    factor = jnp.clip(
      state.acceleration * jnp.exp(_numerics.scalar(hyper_rate) * cosine),
      _numerics.scalar(low),
      _numerics.scalar(high),
    )

    def advance(m: _types.Array, g: _types.Array) -> _types.Array:
      new = g.astype(m.dtype) + decay.astype(m.dtype) * m
      return jnp.where(good, new, m)

    def direct(m: _types.Array, g: _types.Array) -> _types.Array:
      dtype = _numerics.wide(g.dtype)
      ahead = g.astype(dtype) + decay.astype(dtype) * m.astype(dtype)
      new = factor.astype(dtype) * ahead
      if g.dtype == jnp.float16:  # The one type whose range a direction leaves.
        top = jnp.asarray(jnp.finfo(g.dtype).max, dtype)
        new = jnp.clip(new, -top, top)
      new = new.astype(g.dtype)
      return jnp.where(good, new, jnp.zeros_like(new))

    new_momentum = jax.tree.map(advance, state.momentum, updates)
    new_state = NgsState(
      count=_numerics.increment(state.count, good),
      num_skipped=_numerics.increment(state.num_skipped, jnp.logical_not(good)),
      acceleration=jnp.where(good, factor, state.acceleration),
      momentum_norm=jnp.where(good, momentum_norm, state.momentum_norm),
      momentum=new_momentum,
    )
    return jax.tree.map(direct, new_momentum, updates), new_state

  return _types.transformation(init, update)
