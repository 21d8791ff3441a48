"""The other Ranger: rectified Adam, lookahead and gradient centralization."""

from collections.abc import Callable
import math
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
from optax_ranger._core.tree import squared_norm
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import transformation
from optax_ranger.steps import _lookahead


@states.exportable
class RangerRadamState(NamedTuple):
  """The state of ``ranger_radam``.

  Attributes:
    count: ``int32``, steps taken so far.
    num_skipped: ``int32``, updates skipped so far because the gradient, or its
      squared norm in float32, was not finite.
    first_moment: the decayed mean of gradients, in float32 or better.
    second_moment: the decayed mean of their squares, real.
    lookahead: the slow parameters, as in ``smooth_by_lookahead``.
  """

  count: Array
  num_skipped: Array
  first_moment: PyTree
  second_moment: PyTree
  lookahead: _lookahead.LookaheadState


def ranger_radam(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: Scalar = 0.95,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-5,
  threshold: Scalar = 5.0,
  weight_decay: Scalar = 0.0,
  every: Scalar = 6,
  step_size: Scalar = 0.5,
  output_axis: int | None = -1,
  stack_axes: int | PyTree | Callable[[PyTree], PyTree] = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""The other Ranger: rectified Adam, lookahead and gradient centralization.

  The optimizer that is known by this name in PyTorch, with the defaults of its
  2020 release, on plain parameters. It has nothing to do with the five steps of
  ``ranger``. It must be last in a chain, inside ``accumulate`` where there is
  one. Evaluate with the slow parameters, ``eval_params(state, params)``; the
  original evaluates with those in training, which are equal every 6 steps.

  .. math::
    g_t &\leftarrow g_t - \operatorname{mean}_\text{inputs} g_t \\
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
    v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    \rho_\infty &= \tfrac{2}{1 - \beta_2} - 1, \qquad
    \rho_t = \rho_\infty - \tfrac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
    r_t^2 = \tfrac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
                  {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t} \\
    u_t &= \frac{-\eta}{1 - \beta_1^t} \begin{cases}
      r_t \sqrt{1 - \beta_2^t} \, m_t / (\sqrt{v_t} + \epsilon)
      & \rho_t > \text{threshold} \\ m_t & \text{else} \end{cases}

  and every 6 steps the parameters return to their slow copy. It differs from
  ``optax.radam`` in where :math:`\epsilon` stands, and computes :math:`\rho_t`
  without its cancellation, which costs float32 half of its digits.

  Args:
    learning_rate: :math:`\eta`, a number, or a schedule of the step.
    b1: :math:`\beta_1` in [0, 1).
    b2: :math:`\beta_2` in (0, 1).
    eps: :math:`\epsilon`, positive: outside the root, of the *uncorrected* second
      moment.
    threshold: the least length :math:`\rho_t`, 4 or more, that must be exceeded
      to rectify: 4 in the paper, 5 in its authors' code and in Ranger.
    weight_decay: multiplied with the learning rate and the parameters, apart
      from the gradient (decoupled); 0 is none.
    every: steps from one return to the slow parameters to the next, as in
      ``smooth_by_lookahead``.
    step_size: how far these move, as in ``smooth_by_lookahead``.
    output_axis: the axis of the output units, over which gradients are not
      centralized: -1 as in Flax, where kernels are ``[..., in, out]``; 0 as in
      PyTorch, where they are ``[out, in, ...]``, and as ``optax.centralize``
      assumes; None leaves centralization out. Leaves of fewer than two
      dimensions pass.
    stack_axes: how many leading axes of a leaf stack layers, as ``flax.linen.scan``
      and a vmapped ``init`` make them: 1 for ``[layers, in, out]``. Each layer is
      centralized as if it stood alone, so a bias of ``[layers, out]`` passes, and
      ``output_axis`` is one of a layer. A number for all leaves; a tree of them
      that starts like the parameters, such as ``{"embed": 0, "blocks": 1}``; or a
      function from the updates to it.

  Shapes:
    Any tree to the same tree. The state holds three copies of the parameters in
    float32 or better.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its ``update`` needs
    ``params``.

  Guarantees:
    * Fifty steps equal the original in NumPy and in PyTorch, with its
      ``degenerated_to_sgd=True``.
    * Rectification is exact to float32.
    * A non-finite gradient gives zeros and changes only a counter; it ruins a run of
      the original.

  Raises:
    ValueError: for arguments out of range, a call without ``params``, and
      gradients that differ from device to device under ``jax.shard_map``.
    TypeError: for parameters that hold integers, Python numbers or functions, and
      for the state of another step.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> tx = ranger.ranger_radam(0.1)
    >>> params = {"kernel": jnp.ones([2, 3]), "bias": jnp.zeros([3])}
    >>> state = tx.init(params)
    >>> gradient = {"kernel": jnp.ones([2, 3]), "bias": jnp.ones([3])}
    >>> updates, state = jax.jit(tx.update)(gradient, state, params)
    >>> print(f"{updates['bias'][0]:.4f} {updates['kernel'][0, 0]}")  # centralized
    -0.1000 -0.0

  References:
    Wright, Ranger: a synergistic optimizer, 2019 and 2020,
    https://github.com/lessw2020/Ranger-Deep-Learning-Optimizer; Liu et al., On
    the Variance of the Adaptive Learning Rate and Beyond, 2020,
    https://arxiv.org/abs/1908.03265, algorithm 2; Yong et al., Gradient
    Centralization, 2020, https://arxiv.org/abs/2004.01461, equation 1.
  """
  validate.in_range("b1", b1, 0, 1, open_high=True)
  validate.in_range("b2", b2, 0, 1, open_low=True, open_high=True)
  validate.in_range("eps", eps, 0, float("inf"), open_low=True, open_high=True)
  validate.in_range("threshold", threshold, 4, float("inf"), open_high=True)
  if output_axis is not None:
    validate.integer("output_axis", output_axis)
  if not callable(stack_axes):
    for depth in jax.tree.leaves(stack_axes):
      validate.integer("stack_axes", depth)
      validate.count("stack_axes", depth, least=0)
  lookahead: Any = _lookahead.smooth_by_lookahead(every, step_size)

  def init(params: PyTree) -> RangerRadamState:
    validate.parameters(params, "ranger_radam", copied=True)
    wide = lambda p: jnp.zeros_like(p, dtype=numerics.wide(p.dtype))
    real = lambda p: jnp.zeros_like(p, dtype=numerics.real(numerics.wide(p.dtype)))
    return RangerRadamState(
      count=numerics.zero_count(),
      num_skipped=numerics.zero_count(),
      first_moment=jax.tree.map(wide, params),
      second_moment=jax.tree.map(real, params),
      lookahead=lookahead.init(params),
    )

  # One step and not a chain: each output is computed from moments that are
  # chosen already, so that nothing of the parameters' size is held beside them.
  def update(
    updates: PyTree,
    state: RangerRadamState,
    params: PyTree = None,
    **extra_args: Any,
  ) -> tuple[PyTree, RangerRadamState]:
    del extra_args
    validate.given_params(params, "ranger_radam")
    validate.state(state, RangerRadamState, "ranger_radam")
    validate.same_tree("updates", updates, state.first_moment, "ranger_radam")
    validate.same_tree("params", params, state.first_moment, "ranger_radam")
    same = jax.tree.map(lambda leaf: state.count, updates)
    validate.reduced("updates", updates, same, "ranger_radam")
    # Behind a barrier, or XLA would keep the squares for the second moment.
    own = like_tree(updates, state.first_moment)
    params = like_tree(params, state.first_moment)
    apart = jax.lax.optimization_barrier(own)
    good = jnp.isfinite(squared_norm(apart))
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    count = numerics.increment(state.count)
    dtype = numerics.widest_real(state.first_moment)
    steps = count.astype(dtype)
    rectify, scale = _rectification(
      steps, _log(b2, dtype), numerics.scalar(threshold, dtype)
    )
    scale = scale / -jnp.expm1(steps * _log(b1, dtype))
    depths = stack_axes(own) if callable(stack_axes) else stack_axes
    gradient = jax.tree_util.tree_map_with_path(
      lambda path, leaf, depth: _centralized(path, leaf, output_axis, depth),
      own,
      jax.tree.broadcast(depths, own),
    )

    # As steps towards the new value: the decay itself, rounded to float32, would
    # be off by a thousandth of what is left of it at 0.9999.
    def first(m: Array, g: Array) -> Array:
      return jnp.where(good, m + numerics.one_minus(b1, m.dtype) * (g - m), m)

    def second(v: Array, g: Array) -> Array:
      square = jnp.real(g * jnp.conj(g))
      return jnp.where(good, v + numerics.one_minus(b2, v.dtype) * (square - v), v)

    def direct(m: Array, v: Array, param: Array, update: Array) -> Array:
      root = jnp.sqrt(v) + numerics.scalar(eps, v.dtype)
      root = jnp.where(rectify, root, jnp.ones_like(root)).astype(m.dtype)
      direction = scale.astype(m.dtype) * m / root
      direction += numerics.scalar(weight_decay, m.dtype) * param.astype(m.dtype)
      step = -numerics.scalar(rate, m.dtype) * direction
      return jnp.where(good, step, jnp.zeros_like(step)).astype(update.dtype)

    first_moment = jax.tree.map(first, state.first_moment, gradient)
    second_moment = jax.tree.map(second, state.second_moment, gradient)
    ahead = jax.tree.map(direct, first_moment, second_moment, params, own)
    result, slow = _lookahead.look_ahead(
      ahead, state.lookahead, params, every, step_size, advance=good
    )
    return like_tree(result, updates), RangerRadamState(
      count=jnp.where(good, count, state.count),
      num_skipped=numerics.increment(state.num_skipped, jnp.logical_not(good)),
      first_moment=first_moment,
      second_moment=second_moment,
      lookahead=slow,
    )

  return transformation(init, update)


def _centralized(path: Any, leaf: Array, output_axis: int | None, depth: int) -> Array:
  """The gradient in float32 or better, without its mean over the input axes.

  The first `depth` axes stack layers, which are centralized apart.
  """
  wide = leaf.astype(numerics.wide(leaf.dtype))
  where = f"updates{jax.tree_util.keystr(path)} of shape {list(leaf.shape)}"
  rank = leaf.ndim - depth
  if rank < 0:
    raise ValueError(f"{where} has fewer than stack_axes={depth} axes.")
  if output_axis is None or rank < 2:
    return wide
  if not -rank <= output_axis < rank:
    layers = f" after {depth} stack_axes" if depth else ""
    raise ValueError(
      f"output_axis must be an axis of {where}{layers}, got {output_axis}."
    )
  inputs = tuple(depth + i for i in range(rank) if i != output_axis % rank)
  size = max(1, math.prod(leaf.shape[i] for i in inputs))
  total = wide.sum(axis=inputs, keepdims=True)
  return wide - total * jnp.asarray(1 / size, total.dtype)


def _log(decay: Any, dtype: Any) -> Array:
  """The logarithm of a decay, in float64 where it is a plain number."""
  if isinstance(decay, (int, float)):
    with np.errstate(divide="ignore"):
      return numerics.scalar(np.log(np.float64(decay)), dtype)
  return jnp.log(numerics.scalar(decay, dtype))


def _rectification(
  steps: Array, log_decay: Array, threshold: Array
) -> tuple[Array, Array]:
  r"""Whether to rectify, and the factor of the mean if so, else 1.

  With :math:`L = -\log \beta_2` and :math:`x = t L`, the lengths are

  .. math::
    \rho_\infty = \coth(L / 2), \qquad
    \rho_t = (\rho_\infty - 2 / L) + \tfrac{2}{L} (1 - x / (e^x - 1))

  where the subtraction of nearly equal numbers is left to two short series.
  """
  rate = -log_decay
  x = steps * rate
  limit = 1 / jnp.tanh(rate / 2)
  # Where the subtraction costs as many digits as the series lacks.
  small, near = (0.02, 0.15) if x.dtype == jnp.float64 else (0.5, 0.5)
  series = rate / 6 - rate**3 / 360 + rate**5 / 15120
  offset = jnp.where(rate < small, series, limit - 2 / rate)
  series = x / 2 - x**2 / 12 + x**4 / 720 - x**6 / 30240 + x**8 / 1209600
  length = offset + 2 / rate * jnp.where(x < near, series, 1 - x / jnp.expm1(x))
  rectify = jnp.logical_and(length > threshold, limit > 4)
  safe = lambda value: jnp.where(rectify, value, jnp.ones_like(value))
  ratio = (length - 4) * (length - 2) * limit / safe((limit - 4) * (limit - 2) * length)
  # One minus the decay's power: the bias of the second moment.
  squared = ratio * -jnp.expm1(-x)
  return rectify, jnp.sqrt(safe(squared))
