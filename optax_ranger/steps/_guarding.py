"""Step 2, guarded: skips non-finite and outlier updates."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import numerics
from optax_ranger._core import replay
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.sharding import like
from optax_ranger._core.tree import all_finite
from optax_ranger._core.tree import squared_norm
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import transformation


@states.exportable
class SkipState(NamedTuple):
  """The state of ``skip_anomalies``.

  Attributes:
    count: ``int32``, updates in the statistics so far: accepted and not zero.
    num_skipped: ``int32``, updates skipped so far.
    num_skipped_in_a_row: ``int32``, updates skipped since the last accepted one.
    mean: ``float32``, the running mean of the logarithm of what is watched.
    variance: ``float32``, its running variance around that mean.
    inner_state: the state of the inner transformation.
  """

  count: Array
  num_skipped: Array
  num_skipped_in_a_row: Array
  mean: Array
  variance: Array
  inner_state: PyTree


@states.exportable
class SkipNonFiniteState(NamedTuple):
  """The state of ``skip_nonfinite``.

  Attributes:
    num_skipped: ``int32``, updates skipped so far.
    inner_state: the state of the inner transformation.
  """

  num_skipped: Array
  inner_state: PyTree


def skip_nonfinite(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Skips updates that are not finite: `inner` never sees them.

  It gives zeros then, and leaves `inner`'s state as it was. Unlike
  ``optax.apply_if_finite`` it accepts none after a number of them, and adds one
  read of the gradient to `inner` and no memory. To skip spikes as well, use
  ``skip_anomalies``.

  Args:
    inner: the transformation to guard; any optimizer.

  Shapes:
    Any tree to the same tree. The state is `inner`'s and a counter.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * Finite updates are those of `inner`.
    * A non-finite update, or one with an entry whose square is infinite in float32,
      changes only the counter.

  Raises:
    ValueError: for gradients that differ from device to device under
      ``jax.shard_map``: each would decide alone.
    TypeError: for parameters that hold integers, Python numbers or functions, for
      the state of another step, and for an ``inner`` whose state changes its
      structure, shapes or types.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> tx = ranger.skip_nonfinite(optax.sgd(0.1, momentum=0.9))
    >>> params = jnp.array(1.0)
    >>> updates, state = tx.update(jnp.array(jnp.nan), tx.init(params), params)
    >>> print(updates, state.num_skipped)
    0.0 1
  """
  inner = optax.with_extra_args_support(inner)

  def init(params: PyTree) -> SkipNonFiniteState:
    validate.parameters(params, "skip_nonfinite")
    return SkipNonFiniteState(numerics.zero_count(), inner.init(params))

  def update(
    updates: PyTree,
    state: SkipNonFiniteState,
    params: PyTree = None,
    **extra_args: Any,
  ) -> tuple[PyTree, SkipNonFiniteState]:
    validate.state(state, SkipNonFiniteState, "skip_nonfinite")
    validate.arrays("updates", updates, "skip_nonfinite")
    same = jax.tree.map(lambda leaf: state.num_skipped, updates)
    validate.reduced("updates", updates, same, "skip_nonfinite")
    # Finite entries may still have squares that overflow an inner moment.
    good = all_finite(updates, squares=True)
    result, inner_state = _guarded(
      inner, good, updates, state.inner_state, params, extra_args
    )
    return result, SkipNonFiniteState(
      num_skipped=numerics.increment(state.num_skipped, jnp.logical_not(good)),
      inner_state=inner_state,
    )

  return transformation(init, update)


def skip_anomalies(
  inner: optax.GradientTransformation,
  *,
  threshold: Scalar = 6.0,
  decay: Scalar = 0.98,
  warmup: Scalar = 20,
  watch: str = "norm",
  max_in_a_row: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Skips an update whose gradient norm, or loss, is not finite or an outlier.

  It helps where single batches or faulty hardware send a spike; it hurts where
  gradients really jump (a new task, a schedule that restarts), which is what
  ``max_in_a_row`` is for. Norms spread by factors, so the score is taken of
  their logarithm; only upwards is an outlier.

  .. math::
    z_t = \frac{\log x_t - \mu}{\max(\sigma, \sigma_{\min})}, \qquad
    \text{skip if } z_t > \text{threshold}

  Args:
    inner: the transformation to guard; any optimizer.
    threshold: the score above which an update is skipped, positive; infinity
      skips only what is not finite.
    decay: of the running mean and variance, in [0, 1).
    warmup: updates in the statistics before any finite one may be skipped, at
      least 2. An update of zeros is accepted and stays out of them.
    watch: ``"norm"``: the global norm of the updates. ``"value"``: the loss,
      passed as ``value=``; then the updates must be finite as well.
    max_in_a_row: after this many skips in a row, finite outliers are accepted
      (and the statistics start again from them). None keeps skipping. What is
      not finite is never accepted.

  Extra args of ``update``:
    value: the loss, for ``watch="value"``; a scalar. Forwarded to `inner`.

  Shapes:
    Any tree to the same tree, types kept. The state holds five scalars beside
    `inner`'s state. Nothing is read back to the host.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * A skipped update is zero and does not change the state of `inner`.
    * Skipped values do not enter the statistics.
    * Non-finite updates are never accepted.

  Raises:
    ValueError: for arguments out of range, for a missing ``value=``, and for
      gradients that differ from device to device under ``jax.shard_map``.
    TypeError: for parameters that hold integers, Python numbers or functions, for
      the state of another step, and for an ``inner`` whose state changes its
      structure, shapes or types.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> step = ranger.skip_anomalies(optax.sgd(1.0), warmup=2)
    >>> state = step.init(jnp.array(0.0))
    >>> for gradient in (1.0, 1.1, 1000.0, 0.9):
    ...   update, state = step.update(jnp.array(gradient), state)
    ...   print(update, state.num_skipped)
    -1.0 0
    -1.1 0
    0.0 1
    -0.9 1
  """
  validate.in_range("threshold", threshold, 0, float("inf"), open_low=True)
  validate.in_range("decay", decay, 0, 1, open_high=True)
  validate.count("warmup", warmup, least=2)
  validate.choice("watch", watch, ("norm", "value"))
  if max_in_a_row is not None:
    validate.count("max_in_a_row", max_in_a_row)
  inner = optax.with_extra_args_support(inner)

  def init(params: PyTree) -> SkipState:
    validate.parameters(params, "skip_anomalies")
    return SkipState(
      count=numerics.zero_count(),
      num_skipped=numerics.zero_count(),
      num_skipped_in_a_row=numerics.zero_count(),
      mean=jnp.zeros([], jnp.float32),
      variance=jnp.zeros([], jnp.float32),
      inner_state=inner.init(params),
    )

  def update(
    updates: PyTree,
    state: SkipState,
    params: PyTree = None,
    *,
    value: Any = None,
    **extra_args: Any,
  ) -> tuple[PyTree, SkipState]:
    validate.state(state, SkipState, "skip_anomalies")
    validate.arrays("updates", updates, "skip_anomalies")
    same = jax.tree.map(lambda leaf: state.count, updates)
    validate.reduced("updates", updates, same, "skip_anomalies")
    if watch == "value":
      validate.given("value", value, 'skip_anomalies(watch="value")')
      validate.shape("value", value, ())
      watched = numerics.scalar(value)
      finite = jnp.logical_and(jnp.isfinite(watched), all_finite(updates))
    else:
      watched = jnp.sqrt(squared_norm(updates))
      finite = jnp.isfinite(watched)
    size = jnp.abs(watched)
    # Zero has no logarithm: it is accepted, and stays out of the statistics.
    usual = jnp.logical_and(finite, size > 0)
    level = jnp.log(jnp.where(usual, size, jnp.ones_like(size)))
    level = jnp.where(usual, level, state.mean)

    spread = jnp.maximum(jnp.sqrt(state.variance), jnp.float32(_LEAST_SPREAD))
    outlier = (level - state.mean) / spread > numerics.scalar(threshold)
    warm = state.count >= numerics.scalar(warmup, jnp.int32)
    outlier = jnp.logical_and(outlier, warm)
    restart = jnp.zeros([], bool)
    if max_in_a_row is not None:
      limit = numerics.scalar(max_in_a_row, jnp.int32)
      restart = jnp.logical_and(outlier, state.num_skipped_in_a_row >= limit)
      outlier = jnp.logical_and(outlier, jnp.logical_not(restart))
    accept = jnp.logical_and(finite, jnp.logical_not(outlier))

    result, inner_state = _guarded(
      inner, accept, updates, state.inner_state, params, _with_value(extra_args, value)
    )
    count = jnp.where(restart, jnp.zeros_like(state.count), state.count)
    mean, variance = _moments(state, count, level, numerics.one_minus(decay))
    learn = jnp.logical_and(accept, usual)
    skipped = jnp.logical_not(accept)
    in_a_row = numerics.increment(state.num_skipped_in_a_row)
    return result, SkipState(
      count=jnp.where(learn, numerics.increment(count), state.count),
      num_skipped=numerics.increment(state.num_skipped, skipped),
      num_skipped_in_a_row=jnp.where(skipped, in_a_row, jnp.zeros_like(in_a_row)),
      mean=jnp.where(learn, mean, state.mean),
      variance=jnp.where(learn, variance, state.variance),
      inner_state=inner_state,
    )

  return transformation(init, update)


def _guarded(
  inner: Any,
  good: Array,
  updates: PyTree,
  inner_state: PyTree,
  params: PyTree,
  extra_args: dict[str, Any],
) -> tuple[PyTree, PyTree]:
  """Runs `inner`; where it isn't good, zeros and the old state."""
  nodes, inner_state = replay.guarded(
    lambda old: inner.update(updates, old, params, **extra_args), inner_state, good
  )

  def choose(given: Array, node: replay.Node) -> Array:
    result = like(node.value.astype(given.dtype), given)
    return jnp.where(good, result, jnp.zeros_like(result))

  return jax.tree.map(choose, updates, nodes), inner_state


# Of the logarithm: a spread below five percent is taken for five, so that a run
# whose norms hardly differ does not call the first small change an outlier.
_LEAST_SPREAD = 0.05


def _moments(
  state: SkipState, count: Array, level: Array, rate: Array
) -> tuple[Array, Array]:
  """Running mean and variance with this level in: plain averages at first."""
  seen = count.astype(jnp.float32)
  rate = jnp.maximum(rate, 1 / (seen + 1))
  deviation = level - state.mean
  mean = state.mean + rate * deviation
  variance = (1 - rate) * (state.variance + rate * deviation * deviation)
  return mean, variance


def _with_value(extra_args: dict[str, Any], value: Any) -> dict[str, Any]:
  return extra_args if value is None else {**extra_args, "value": value}
