"""Step 5: an exponential moving average of the parameters."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.sharding import like
from optax_ranger._core.tree import unboxed
from optax_ranger._core.tree import wide_copy
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import ScalarOrSchedule
from optax_ranger._core.types import transformation


@states.exportable
class EmaState(NamedTuple):
  """The state of ``smooth_by_ema``.

  Attributes:
    count: ``int32``, steps taken so far.
    num_averaged: ``int32``, iterates averaged so far, with the latest.
    rate: the share of the latest iterate, in float32 or better, which `ema` does
      not hold yet: it is averaged when the next step brings it along.
    ema: the smoothed parameters before that, in float32 or better.
  """

  count: Array
  num_averaged: Array
  rate: Array
  ema: PyTree

  def smoothed_copy(self) -> tuple[Array, PyTree]:
    """All of the parameters, where nothing is averaged yet."""
    rate = jnp.asarray(unboxed(self.rate))
    averaged = unboxed(self.num_averaged) > 0
    return jnp.where(averaged, rate, jnp.ones_like(rate)), self.ema


def uniform_decay_schedule() -> Callable[[Any], Array]:
  r"""Returns the decay of ``smooth_by_ema`` that makes it a plain mean.

  .. math:: \beta_n = n / (n + 1)

  after n iterates: stochastic weight averaging (SWA), given the ``start`` and
  ``every`` of ``smooth_by_ema``.

  Returns:
    A schedule, from the number of iterates averaged so far to the decay.

  Examples:
    >>> import optax_ranger as ranger
    >>> print(*[ranger.uniform_decay_schedule()(n) for n in (0, 1, 3)])
    0.0 0.5 0.75

  References:
    Izmailov et al., Averaging Weights Leads to Wider Optima and Better
    Generalization, 2018, https://arxiv.org/abs/1803.05407, algorithm 1.
  """

  def schedule(count: Any) -> Array:
    done = jnp.asarray(count).astype(jnp.float32)
    return done / (done + 1)

  return schedule


def smooth_by_ema(
  decay: ScalarOrSchedule, *, warmup: Scalar = 0, start: Scalar = 0, every: Scalar = 1
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps a moving average of the parameters; updates pass through.

  Evaluate with ``eval_params(state, params)``. It helps where the last iterate
  is noisy. With a decay too near 1 for the length of the run it lags, since it
  starts at the initial parameters: ``warmup`` or ``start`` mend that. Place it
  inside ``accumulate``, where it is called once an optimizer step. It averages
  parameters as they come in, rounded and projected as they may be, and
  ``eval_params`` adds the latest.

  .. math::
    \bar\theta_n &= \beta_n \bar\theta_{n-1} + (1 - \beta_n) \theta \\
    \beta_n &= \min\big(\beta, (1 + n) / (w + n)\big)

  with n iterates averaged before and warm-up w.

  Args:
    decay: :math:`\beta` in [0, 1), or a schedule of n. 0 keeps the parameters
      themselves; the average is over about :math:`1 / (1 - \beta)` iterates.
      ``uniform_decay_schedule()`` makes it the mean of all (SWA).
    warmup: w, not negative. At 1 or less the decay is :math:`\beta` from the
      first step; larger ones forget the initial parameters sooner, 10 being
      usual.
    start: steps before the average begins, from the parameters at that step;
      before, ``eval_params`` returns those in training.
    every: steps from one averaged iterate to the next.

  Shapes:
    Any tree to the same tree, untouched. The state holds one copy of the
    parameters in float32 or better, with their shardings.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its ``update`` needs
    ``params``.

  Guarantees:
    * Updates pass through untouched.
    * A uniform decay gives the mean of the iterates from ``start`` on.
    * A non-finite entry does not change its average.

  Raises:
    ValueError: for arguments out of range, for a call without ``params``, and for
      updates or parameters unlike those that ``init`` was given.
    TypeError: for parameters that hold integers, Python numbers or functions, for
      abstract ones, and for the state of another step.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> tx = optax.chain(optax.sgd(1.0), ranger.smooth_by_ema(0.75))
    >>> params = jnp.array(1.0)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jnp.array(-4.0), state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(params, ranger.eval_params(state, params))  # 3/4 * 1 + 1/4 * 5
    5.0 2.0

  References:
    Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging,
    1992, https://doi.org/10.1137/0330046; the warm-up is that of TensorFlow's
    ``ExponentialMovingAverage(num_updates=)``, with w = 10.
  """
  if not callable(decay):
    validate.in_range("decay", decay, 0, 1, open_high=True)
  validate.in_range("warmup", warmup, 0, float("inf"), open_high=True)
  validate.count("start", start, least=0)
  validate.count("every", every)

  def init(params: PyTree) -> EmaState:
    validate.parameters(params, "smooth_by_ema", copied=True)
    return EmaState(
      count=numerics.zero_count(),
      num_averaged=numerics.zero_count(),
      rate=jnp.zeros([], numerics.widest_real(params)),
      ema=wide_copy(params),
    )

  def update(
    updates: PyTree,
    state: EmaState,
    params: PyTree = None,
    **extra_args: Any,
  ) -> tuple[PyTree, EmaState]:
    del extra_args
    validate.given_params(params, "smooth_by_ema")
    validate.state(state, EmaState, "smooth_by_ema")
    validate.same_tree("updates", updates, state.ema, "smooth_by_ema")
    validate.same_tree("params", params, state.ema, "smooth_by_ema")
    dtype = state.rate.dtype
    beta = decay(state.num_averaged) if callable(decay) else decay
    done = state.num_averaged.astype(dtype)
    warm = numerics.scalar(warmup, dtype)
    # One minus (1 + n) / (w + n), which falls to 0; at w of 1 or less it never
    # binds, and -1 / 0 gives -inf.
    rate = jnp.maximum(numerics.one_minus(beta, dtype), (warm - 1) / (warm + done))
    steps = state.count - numerics.scalar(start, jnp.int32)
    interval = numerics.scalar(every, jnp.int32)
    due = jnp.logical_and(steps >= 0, (steps + 1) % interval == 0)
    begin = steps == 0

    # The new iterate waits for the next call, which has it as its parameters:
    # to compute it here a second time would cost a buffer and twice the time.
    def smooth(ema: Array, param: Array) -> Array:
      param = like(param, ema)
      moved = jnp.where(
        begin, param.astype(ema.dtype), numerics.step_towards(ema, param, state.rate)
      )
      return jnp.where(jnp.isfinite(moved), moved, ema)

    # The average is always finite where the parameters were at first, so this
    # changes nothing. It orders the two passes: else XLA, free to write the new
    # parameters first, keeps a copy of the old ones for the average.
    def after(update: Array, ema: Array) -> Array:
      if jax.typeof(ema).sharding != jax.typeof(update).sharding:
        return update  # It would take communication.
      return jnp.where(jnp.isfinite(ema), update, jnp.zeros_like(update))

    ema = jax.tree.map(smooth, state.ema, params)
    return jax.tree.map(after, updates, ema), EmaState(
      count=numerics.increment(state.count),
      num_averaged=numerics.increment(state.num_averaged, due),
      rate=jnp.where(due, rate, jnp.zeros_like(rate)),
      ema=ema,
    )

  return transformation(init, update)
