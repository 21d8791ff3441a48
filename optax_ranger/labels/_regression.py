"""Targets that are numbers: their support, the scale of residuals, a robust loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.sharding import automatic
from optax_ranger._core.sharding import first_sharded
from optax_ranger._core.sharding import per_row
from optax_ranger._core.types import Array
from optax_ranger._core.types import Neighbors
from optax_ranger._core.types import Scalar
from optax_ranger.labels import _rows
from optax_ranger.neighbors import _weights

# The median absolute value of a standard normal draw, inverted.
_NORMAL = 1.482602218505602
# The distance, in scales, at which support has fallen to one half; also the limit
# of the neighbors' own spread.
_HALF = 3.0


def target_support(neighbors: Neighbors, targets: Any, *, scale: Any = None) -> Array:
  r"""Tells how far the neighborhood of each example backs its target.

  The counterpart of ``label_support`` for numbers. Low support marks suspicious
  targets: sort by it, or weigh examples by it. It helps against gross errors. It
  hurts where neighbors say little about the target, such as at the end of a long
  tail.

  .. math::
    m_i &= \mathrm{median}_j \, y_{N(i, j)}, \qquad
    \sigma_i = 1.4826 \, \mathrm{median}_j \, |y_{N(i, j)} - m_i| \\
    s_i^2 &= s^2 + \min ( \sigma_i, 3 s )^2, \qquad
    \mathrm{support}_i = \frac{1}{1 + \big( (y_i - m_i) / 3 s_i \big)^4}

  Medians are weighed by the neighbors' weights and leave the example itself out, so
  that no target confirms itself, and fewer than half of the neighbors may be wrong.
  Where neighbors differ among themselves, a target may differ from them.

  Args:
    neighbors: ``Neighbors`` with arrays of ``[n, k]``. Left out are empty places,
      weights that are not positive and finite, and the example itself.
    targets: real numbers ``[n]``, or vectors ``[n, d]``, of which the square of
      :math:`(y_i - m_i) / s_i` is the mean over the columns that are finite. A target
      that is not finite is none.
    scale: s, positive, one number or ``[d]``, such as the noise of the targets. None
      for the robust scale of all :math:`y_i - m_i` around zero.

  Shapes:
    Memory is O(n (k + d)), one column at a time.

  Returns:
    ``float32 [n]`` (float64 for such targets) in [0, 1]: one at the median of the
    neighbors, one half three scales away; 0 where an example has no target, or no
    neighbor that has one. No gradient flows through it.

  Guarantees:
    * It equals a loop.
    * An example's own target does not move its median.
    * It is in [0, 1] for any input.

  Raises:
    ValueError: for shapes that do not fit, and a scale that is not positive.
    TypeError: for targets that are complex, and indices that are not integers.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> neighbors = ranger.neighbors.nearest(jnp.arange(3.0)[:, None], k=2)
    >>> targets = jnp.array([5.0, 5.0, 8.0])  # the last is three scales away
    >>> print(ranger.labels.target_support(neighbors, targets, scale=1.0)[2])
    0.5

  References:
    Rousseeuw and Leroy, Robust Regression and Outlier Detection, 1987,
    https://doi.org/10.1002/0471725382, chapter 4, for medians of location and scale.
    The measure is ours.
  """
  rows = _real("targets", targets)
  if rows.ndim not in (1, 2):
    raise ValueError(f"targets must have shape [n] or [n, d], got {list(rows.shape)}.")
  columns = rows[:, None] if rows.ndim == 1 else rows
  n, width = columns.shape
  if scale is not None:
    scale = _scale_of("scale", scale, width if rows.ndim == 2 else None, rows.dtype)
    scale = jnp.broadcast_to(scale, (width,))
  places, weights = _weights.usable(neighbors, n, rows.dtype)
  others = places != jnp.arange(n, dtype=places.dtype)[:, None]
  weights = jnp.where(others, weights, jnp.zeros_like(weights))
  on = first_sharded(columns, places)
  backed = automatic(_backed, on, on)(columns, places, weights, scale)
  return jax.lax.stop_gradient(backed)


@functools.partial(jax.jit, inline=True)
def _backed(
  columns: Array, places: Array, weights: Array, scale: Array | None
) -> Array:
  """The support of targets [n, d]."""

  def one_column(given):
    own, scale = given
    values = own[places]
    used = _usable_weights(values, weights)
    middle = _median(values, used)
    spread = _NORMAL * _median(jnp.abs(values - middle[:, None]), used)
    known = jnp.logical_and(used.any(axis=1), jnp.isfinite(own))
    away = jnp.where(known, jnp.abs(own - middle), jnp.zeros_like(own))
    if scale is None:
      scale = _scale(
        away[None], known[None].astype(away.dtype), jnp.zeros_like(away[:1])
      )
    scale = jnp.broadcast_to(scale, spread.shape)
    # Bounded: by chance, half of the neighbors may be gross errors.
    spread = jnp.hypot(jnp.minimum(spread, _HALF * scale), scale)
    far = jnp.where(away > 0, jnp.asarray(jnp.inf, away.dtype), away)
    ratio = jnp.where(spread > 0, numerics.divide(away, spread), far)
    return (ratio / _HALF) ** 2, known

  squares, known = jax.lax.map(one_column, (columns.T, scale))
  count = known.sum(axis=0, dtype=jnp.int32)
  square = squares.sum(axis=0) / jnp.maximum(count, 1).astype(squares.dtype)
  support = 1 / (1 + square**2)  # Not a number where infinity is over infinity.
  usable = jnp.logical_and(count > 0, support >= 0)
  return jnp.where(usable, support, jnp.zeros_like(support))


def robust_scale(residuals: Any, *, weights: Any = None, center: Any = None) -> Array:
  r"""Returns the scale of residuals, whatever fewer than half of them are.

  It is the median absolute deviation, scaled to be the standard deviation of
  normal residuals. Give it to ``robust_regression_loss``, and estimate it again
  after every epoch, as residuals are large early in training. It falls to zero
  where a network memorizes all targets: keep it above a small part of the robust
  scale of the targets, such as a thousandth.

  .. math::
    s = 1.4826 \; \mathrm{median}_i \, |r_i - m|, \qquad m = \mathrm{median}_i \, r_i

  Args:
    residuals: real numbers ``[n]``, or ``[n, d]`` for one scale for each column.
      Those that are not finite are left out.
    weights: ``[n]``, not negative; medians are weighed then. Residuals of a weight
      that is not positive and finite are left out. None for equal weights.
    center: m, one number (or ``[d]``): 0 where residuals should lie around zero.
      None for their median.

  Shapes:
    Sorts twice: time is O(n log n) a column, memory O(n d).

  Returns:
    A ``float32`` scalar, or ``[d]`` (float64 for such residuals), not negative; the
    same on all devices. Where more than half of the residuals are equal, the
    median of the deviations that are not zero; zero where all are equal or there
    is none. No gradient flows through it.

  Guarantees:
    * It equals a loop over sorted residuals, weights as repetitions.
    * Of normal residuals it is their standard deviation; with 40% of them replaced by
      anything, at most three times that.
    * It is finite and not negative for whatever finite residuals are within 1e38.

  Raises:
    ValueError: for shapes that do not fit.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> residuals = jnp.array([-1.0, 0.0, 1.0, 2.0, 1000.0])  # median 1
    >>> print(ranger.labels.robust_scale(residuals))  # of 2 1 0 1 999, times 1.4826
    1.4826022

  References:
    Rousseeuw and Croux, Alternatives to the Median Absolute Deviation, 1993,
    https://doi.org/10.1080/01621459.1993.10476408, equation 1.1.
  """
  rows = _real("residuals", residuals)
  if rows.ndim not in (1, 2):
    raise ValueError(
      f"residuals must have shape [n] or [n, d], got {list(rows.shape)}."
    )
  columns = rows.T if rows.ndim == 2 else rows[None]
  if weights is None:
    weights = jnp.ones_like(columns)
  else:
    weights = jnp.asarray(weights)
    validate.shape("weights", weights, rows.shape[:1])
    weights = jnp.expand_dims(weights.astype(rows.dtype), 0)
    weights = jnp.broadcast_to(weights, columns.shape)
  if center is not None:
    center = jnp.broadcast_to(jnp.asarray(center).astype(rows.dtype), columns.shape[:1])
  on = first_sharded(rows, weights)
  scale = automatic(_scale, on, jnp.zeros([]))(columns, weights, center)
  return jax.lax.stop_gradient(scale if rows.ndim == 2 else scale[0])


def robust_regression_loss(
  predictions: Any,
  targets: Any,
  scale: Any,
  *,
  threshold: Scalar = 1.7,
  slope: Scalar = 1.0,
  mask: Any = None,
) -> Array:
  r"""Returns the loss of each prediction, on which gross errors pull the less.

  The pull of an example grows with its residual up to a threshold of some scales,
  and falls beyond. So it helps against gross errors and heavy tails without a tuned
  threshold. It hurts where large residuals are right, as at the end of a long tail.
  Early in training all residuals are large: begin with the robust scale of the
  targets, and let it follow the residuals epoch by epoch (``robust_scale``).

  .. math::
    \ell_i = \frac{a}{d} \sum_j \tau_j \log \big( 1 + (r_{ij} / \tau_j)^2 \big),
    \qquad r = \mathrm{predictions} - \mathrm{targets}, \quad \tau = c \, s

  The slope is largest at :math:`|r| = \tau`, where it is a, whatever the scale is, as
  that of the absolute error. So a scale that follows the residuals does not change
  the learning rate. With Adam, a does nothing. With SGD, a tenth of the robust scale
  of the targets is a good start.

  Args:
    predictions: ``float [n]``, or ``[n, ..., d]`` for vectors, and tokens or pixels.
    targets: real numbers of the same shape. One that is not finite is none: it has
      neither loss nor gradient.
    scale: s, positive, one number, or ``[d]`` for the last axis. Traced, it may be
      any: not positive or not a number, it counts as the least normal number, and
      nothing pulls. No gradient flows into it.
    threshold: c, positive, in scales. On normal residuals 1.7 has 90% of the
      efficiency of least squares, and 2.385 has 95%. Large values approach the
      squared error, divided by c s / a.
    slope: a, positive, the largest slope.
    mask: booleans or integers of the shape of the targets: zero where one does not
      count. None if all do.

  Shapes:
    Averaged over the axes after the first, over targets that are there and not
    masked. Memory is that of the targets.

  Returns:
    ``float32 [n]`` (float64 for such predictions), not negative, in the unit of the
    targets; zero for an example without a target. A prediction that is not a number
    makes a loss that is none, of this example only.

  Guarantees:
    * Loss and gradient equal their formulas.
    * The slope is at most a, and falls beyond the threshold.
    * Finite predictions have a finite loss and gradient, whatever targets and scale
      are.

  Raises:
    ValueError: for shapes that do not fit, and a scale, threshold or slope that is not
      positive or not finite, where they are known.
    TypeError: for complex numbers, and a mask of floats.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> loss = lambda r: ranger.labels.robust_regression_loss(
    ...   r, jnp.zeros(3), scale=0.5, threshold=2.0  # of slope 2 r / (1 + r^2)
    ... )
    >>> residuals = jnp.array([0.5, 1.0, 7.0])
    >>> print(jax.jit(jax.grad(lambda r: loss(r).sum()))(residuals))
    [0.8  1.   0.28]

  References:
    Black and Rangarajan, On the Unification of Line Processes, Outlier Rejection, and
    Robust Statistics, 1996, https://doi.org/10.1007/BF00131148, figure 4, for the
    Lorentzian (Cauchy's) loss; Holland and Welsch, Robust Regression Using
    Iteratively Reweighted Least-Squares, 1977,
    https://doi.org/10.1080/03610927708827533, table 1, for c.
  """
  top = float("inf")
  for name, value in (("threshold", threshold), ("slope", slope)):
    validate.in_range(name, value, 0, top, open_low=True, open_high=True)
  predictions, targets = _real("predictions", predictions), _real("targets", targets)
  if not predictions.ndim:
    raise ValueError("predictions must have shape [n] or [n, ...], got [].")
  validate.shape("targets", targets, predictions.shape)
  dtype = predictions.dtype
  targets = per_row(targets.astype(dtype), predictions)
  width = predictions.shape[-1] if predictions.ndim > 1 else None
  scale = jax.lax.stop_gradient(_scale_of("scale", scale, width, dtype))
  least, most = (
    jnp.asarray(end, dtype) for end in (jnp.finfo(dtype).tiny, jnp.finfo(dtype).max)
  )
  tau = numerics.scalar(threshold, dtype) * scale
  tau = jnp.where(tau >= least, jnp.minimum(tau, most), least)
  there = _rows.read_mask(mask, jnp.isfinite(targets))
  targets = jnp.where(there, targets, jnp.zeros_like(targets))
  predictions = jnp.where(there, predictions, jnp.zeros_like(predictions))
  if tau.ndim:
    tau = jnp.expand_dims(tau, tuple(range(predictions.ndim - 1)))
  residuals = jnp.clip(predictions - targets, -most, most)
  loss = _lorentzian(residuals, jnp.zeros_like(residuals) + tau)
  return _rows.mean_over_places(numerics.scalar(slope, dtype) * loss, there)


@jax.custom_jvp
def _lorentzian(residuals: Array, tau: Array) -> Array:
  """Tau log(1 + (r / tau)^2), without overflow: r^2 alone may be infinite."""
  small, far = _small(residuals, tau)
  size = jnp.where(far, jnp.abs(residuals), tau)
  return tau * (jnp.log1p(small * small) + 2 * (jnp.log(size) - jnp.log(tau)))


@_lorentzian.defjvp
def _slope(primals: Any, tangents: Any) -> tuple[Array, Array]:
  """2 u / (1 + u^2) is the same for u and 1 / u. No gradient flows into tau."""
  residuals, tau = primals
  small, _ = _small(residuals, tau)
  slope = jnp.sign(residuals) * (2 * small / (1 + small * small))
  return _lorentzian(residuals, tau), slope * tangents[0]


def _small(residuals: Array, tau: Array) -> tuple[Array, Array]:
  """U = |r| / tau or 1 / u, whichever is at most one, and whether it is 1 / u."""
  size = jnp.abs(residuals)
  far = jnp.logical_not(size <= tau)  # NaN counts as far, and stays NaN.
  return jnp.where(far, tau, size) / jnp.where(far, size, tau), far


@functools.partial(jax.jit, inline=True)
def _scale(values: Array, weights: Array, center: Array | None) -> Array:
  """The scale of each row of values [d, n]."""
  weights = _usable_weights(values, weights)
  if center is None:
    center = _median(values, weights)
  away = jnp.abs(values - center[:, None])
  half = _median(away, weights)
  # If over half are equal, use the others: a scale of zero is useless.
  other = jnp.where(away > 0, weights, jnp.zeros_like(weights))
  half = jnp.where(half > 0, half, _median(away, other))
  return numerics.scalar(_NORMAL, half.dtype) * half


def _usable_weights(values: Array, weights: Array) -> Array:
  """Weights that are positive and finite, of finite values; the others are zero."""
  positive = jnp.logical_and(weights > 0, weights < jnp.inf)
  used = jnp.logical_and(positive, jnp.isfinite(values))
  return numerics.to_peak(jnp.where(used, weights, jnp.zeros_like(weights)), axis=-1)


def _median(values: Array, weights: Array) -> Array:
  """The weighted median of each row of values [m, k]; zero without a weight.

  Where the weights below and above are equal, the middle of both values.
  """
  if not values.size:
    return jnp.zeros(values.shape[:1], values.dtype)
  far = jnp.asarray(jnp.inf, values.dtype)
  values = jnp.where(weights > 0, values, far)
  values, weights = jax.lax.sort((values, weights), dimension=1, num_keys=1)
  below = jnp.cumsum(weights, axis=1)
  half = below[:, -1:] / 2
  # Sums of equal weights on both sides differ by rounding.
  slack = numerics.scalar(16 * jnp.finfo(half.dtype).eps, half.dtype) * half
  low, high = (
    jnp.take_along_axis(values, jnp.argmax(reached, axis=1)[:, None], axis=1)[:, 0]
    for reached in (below >= half - slack, below > half + slack)
  )
  return jnp.where(half[:, 0] > 0, low / 2 + high / 2, jnp.zeros_like(low))


def _real(name: str, values: Any) -> Array:
  """An array of real numbers, in float32 or better."""
  values = jnp.asarray(values)
  if jnp.issubdtype(values.dtype, jnp.complexfloating):
    raise TypeError(f"{name} must be real, got {values.dtype}.")
  if jnp.issubdtype(values.dtype, jnp.floating):
    return values.astype(numerics.wide(values.dtype))
  return values.astype(jnp.float32)


def _scale_of(name: str, scale: Any, width: int | None, dtype: Any) -> Array:
  """A scale, one number or one for each column, that is positive where known."""
  shape = jnp.shape(scale)
  if shape != () and shape != (width,):
    wanted = "one number" if width is None else f"one number or [{width}]"
    raise ValueError(f"{name} must be {wanted}, got shape {list(shape)}.")
  if not shape:
    validate.in_range(name, scale, 0, float("inf"), open_low=True)
  return jnp.asarray(scale).astype(dtype)
