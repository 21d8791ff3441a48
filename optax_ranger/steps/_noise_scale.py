"""How many micro-batches the noise asks for: the gradient noise scale."""

from typing import NamedTuple

import jax.numpy as jnp

from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.types import Array
from optax_ranger._core.types import Scalar


@states.exportable
class NoiseScaleState(NamedTuple):
  """What ``accumulate`` knows of the noise, in its field ``noise``.

  Attributes:
    every: ``int32``, micro-batches in the open window.
    noise_scale: trace / signal, in units of ``weight=``, such as examples; the largest
      float32 where no signal is seen, 0 before the first window has closed.
    trace: the smoothed trace of the covariance of a gradient of weight one.
    signal: the smoothed squared norm of the mean gradient; an estimate, which may be
      negative.
    micro_weight: the smoothed weight of a micro-batch.
    mass: what the smoothed numbers have seen, 0 at the start, towards 1.
    square_sum: of the open window, the weighted sum of squared norms.
    num_parts: ``int32``, gradients in that sum.
  """

  every: Array
  noise_scale: Array
  trace: Array
  signal: Array
  micro_weight: Array
  mass: Array
  square_sum: Array
  num_parts: Array


class NoiseScaleRule(NamedTuple):
  """What ``by_noise_scale`` returns, for ``every=`` of ``accumulate``."""

  max_every: Scalar
  min_every: Scalar
  ratio: Scalar
  decay: Scalar


def by_noise_scale(
  max_every: int,
  *,
  min_every: int = 2,
  ratio: Scalar = 0.05,
  decay: Scalar = 0.9999,
) -> NoiseScaleRule:
  r"""Lets ``accumulate`` choose its windows by the gradient noise scale.

  Pass it as ``every=``. Windows are a share of the noise scale, so they grow as the
  gradient's mean falls below its noise:

  .. math::
    B = \frac{\operatorname{tr} \Sigma}{|G|^2}, \qquad
    m \approx \frac{r B}{w}

  with the covariance :math:`\Sigma` of the gradient of one example, the mean
  gradient :math:`G`, ``ratio`` :math:`r`, and :math:`w` examples in a micro-batch.
  With learning rates that fit, batches of size :math:`r B` need :math:`1 + r` times
  the examples of very small ones, and :math:`1 + 1/r` times the steps of very large
  ones (McCandlish et al., section 2.3). Rates that fit grow with the window: put
  ``scale_by_window`` after the optimizer.

  Both numbers are estimated from norms that ``accumulate`` reads anyway. Of a window
  with micro-gradients :math:`g_j` of weights :math:`w_j`, their sum :math:`W` and
  their weighted mean :math:`\bar g`,

  .. math::
    \operatorname{tr} \Sigma \approx
    \frac{\sum_j w_j |g_j|^2 - W |\bar g|^2}{m - 1}, \qquad
    |G|^2 \approx |\bar g|^2 - \frac{\operatorname{tr} \Sigma}{W}

  are unbiased. They are smoothed apart, then divided.

  To measure only, fix the windows: ``by_noise_scale(8, min_every=8)``. Read the
  result from the state of any chain: ``optax.tree.get(state, "noise_scale")``.

  Args:
    max_every: micro-batches in a window at most.
    min_every: and at least; 2 or more, since one gradient shows no noise. The first
      window has as many, and no window has more than twice those of the one before.
    ratio: the size of a window in units of the noise scale, positive. Larger ones
      save optimizer steps, smaller ones examples.
    decay: how much of the smoothed numbers a micro-batch leaves, in [0, 1). It is slow
      by default: at the end of a training the signal may vanish in the noise.

  Returns:
    A ``NoiseScaleRule``.

  Guarantees:
    * The mean of many estimates, of the trace and of the signal, is the true value.
    * A micro-batch that is left out does not count; a window whose norms overflow
      changes no estimate.
    * Devices agree, also with ``train_step(..., reduce="on_emission")``, where the
      parts of the devices count as gradients of equal weight.

  Raises:
    ValueError: for bounds below 2, ``max_every`` below ``min_every``, and other
      numbers out of range.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> inner = optax.chain(optax.sgd(0.1), ranger.scale_by_window("linear"))
    >>> tx = ranger.accumulate(inner, every=ranger.by_noise_scale(64))
    >>> state = tx.init(jnp.zeros(2))
    >>> for gradient in ([3.0, 1.0], [3.0, -1.0]):  # 32 examples each
    ...     _, state = tx.update(jnp.array(gradient), state, weight=32)
    >>> print(optax.tree.get(state, "noise_scale"))  # 64 / (9 - 1)
    8.0

  References:
    McCandlish et al., An Empirical Model of Large-Batch Training, 2018,
    https://arxiv.org/abs/1812.06162, section 2.2 and appendix A.1.
  """
  validate.count("min_every", min_every, least=2)
  validate.count("max_every", max_every, least=2)
  if validate.is_known(min_every) and validate.is_known(max_every):
    validate.count("max_every", max_every, least=int(min_every))
  validate.in_range("ratio", ratio, 0, float("inf"), open_low=True, open_high=True)
  validate.in_range("decay", decay, 0, 1, open_high=True)
  return NoiseScaleRule(max_every, min_every, ratio, decay)


def start(rule: NoiseScaleRule) -> NoiseScaleState:
  """The state before the first micro-batch."""
  zero = lambda: jnp.zeros([], jnp.float32)
  return NoiseScaleState(
    every=numerics.scalar(rule.min_every, jnp.int32),
    noise_scale=zero(),
    trace=zero(),
    signal=zero(),
    micro_weight=zero(),
    mass=zero(),
    square_sum=zero(),
    num_parts=numerics.zero_count(),
  )


def add(
  state: NoiseScaleState, weight: Array, square: Array, num_parts: int = 1
) -> NoiseScaleState:
  """Counts a micro-batch in; of weight zero it is left out.

  Args:
    state: so far.
    weight: of the micro-batch.
    square: the squared norm of its gradient, or the sum of those of equal parts,
      each as large as the whole gradient, over their number.
    num_parts: parts that its gradient is the mean of.
  """
  counts = weight > 0
  part = weight.astype(jnp.float32) * square
  return state._replace(
    square_sum=state.square_sum + jnp.where(counts, part, jnp.zeros_like(part)),
    num_parts=state.num_parts + jnp.where(counts, num_parts, 0),
  )


def close(
  rule: NoiseScaleRule,
  state: NoiseScaleState,
  weight: Array,
  square: Array,
  calls: Array,
) -> NoiseScaleState:
  """Closes a window: new estimates, and how many micro-batches the next one gets.

  Args:
    rule: the bounds.
    state: with all micro-batches counted in.
    weight: their sum of weights.
    square: the squared norm of their weighted mean.
    calls: micro-batches in the window, with those that are left out.
  """
  weight = weight.astype(jnp.float32)
  parts = state.num_parts.astype(jnp.float32)
  trace = numerics.divide(state.square_sum - weight * square, parts - 1)
  signal = square - numerics.divide(trace, weight)
  seen = jnp.logical_and(state.num_parts > 1, jnp.isfinite(trace + signal + weight))
  calls = calls.astype(jnp.float32)
  # To the last digit also for a decay near one.
  forgotten = jnp.log1p(-numerics.one_minus(rule.decay)) * jnp.maximum(calls, 1)
  new = -jnp.expm1(forgotten)
  mass = state.mass + new * (1 - state.mass)
  rate = numerics.divide(new, mass)
  step = lambda old, new: jnp.where(seen, old + rate * (new - old), old)
  trace, signal = step(state.trace, trace), step(state.signal, signal)
  micro_weight = step(state.micro_weight, numerics.divide(weight, calls))
  positive = jnp.maximum(trace, jnp.zeros_like(trace))
  largest = jnp.asarray(jnp.finfo(trace.dtype).max)
  scale = jnp.minimum(numerics.divide(positive, signal), largest)
  scale = jnp.where(signal > 0, scale, largest)
  scale = jnp.where(seen, scale, state.noise_scale)
  wanted = numerics.divide(numerics.scalar(rule.ratio) * scale, micro_weight)
  limits = [numerics.scalar(each) for each in (rule.min_every, rule.max_every)]
  wanted = jnp.minimum(jnp.round(wanted), 2 * state.every.astype(jnp.float32))
  every = jnp.clip(wanted, *limits).astype(jnp.int32)
  return NoiseScaleState(
    every=jnp.where(seen, every, state.every),
    noise_scale=scale,
    trace=trace,
    signal=signal,
    micro_weight=micro_weight,
    mass=jnp.where(seen, mass, state.mass),
    square_sum=jnp.zeros_like(trace),
    num_parts=jnp.zeros_like(state.num_parts),
  )
