"""`robust_labels`: the recipe against wrong labels."""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ranger import labels as labels_lib
from optax_ranger._core import blocks
from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.sharding import automatic
from optax_ranger._core.sharding import replicate
from optax_ranger._core.types import Array
from optax_ranger._core.types import Scalar
from optax_ranger.labels import _rows

# Learned features that find less than this share of the noise that the given
# features find have memorized labels, and are not used.
_LEAKED = 0.6
# Random features for those that a network has learned, which are simpler.
_RANDOM = 256
_BLOCK = 8192
# The same share: at the first or below, the network memorizes, and weights are sharp;
# at the second or above it does not, and half of the sharpness is enough.
_MEMORIZES, _DOES_NOT = 0.85, 0.95
# Where at most the first share of labels looks wrong, those are hard examples; from the
# second on, all is done against wrong labels.
_CLEAN, _NOISY = 0.04, 0.1
# Projections of the same features, maybe in another precision, differ by less: a share
# of their mean square.
_SAME = 1e-3


class KnownLabels(NamedTuple):
  """What is known of the labels of a training set of n examples and C classes.

  Attributes:
    beliefs: ``float32 [n, C]``, the chance of each class, from other examples; a row
      of zeros where nothing is known.
    trust: ``float32 [n]``, the chance that the label is right, by the features that
      were given to ``init``, which can't memorize.
    weights: ``float32 [n]``, of the losses; their mean over labeled examples is one.
    confusion: ``float32 [C, C]``, the chance of each label given the class.
    spread: how evenly wrong labels fall on the other classes, in [0, 1].
    noise: the share of wrong labels, an estimate by the given features.
    learned_noise: the same by the features of the last ``ask``; NaN before. Where it
      is much smaller than ``noise``, the network has memorized labels: it was asked
      too late.
    believed: how many times ``ask`` believed the features it was given.
    asked: how many times it was called.
    capacity: how far the network could memorize labels, in [0, 1]. 1, or ``2 d / n``
      if that is less, once ``ask`` was given the d features that ``init`` had: a
      linear model of these can't do more. Weights, exponent and smoothing fade with it.
    projection: ``float32 [n]``, a random projection of the features that ``init`` was
      given, by which ``ask`` knows them again.
  """

  beliefs: Array
  trust: Array
  weights: Array
  confusion: Array
  spread: Array
  noise: Array
  learned_noise: Array
  believed: Array
  asked: Array
  capacity: Array
  projection: Array


class RobustLabels(NamedTuple):
  """Pure functions, made by ``robust_labels``.

  Attributes:
    init: ``(features, labels) -> KnownLabels``.
    losses: ``(known, logits, labels, ids) -> losses [n]`` of a batch.
    ask: ``(known, features, labels) -> KnownLabels``, with features that the network
      has learned. Changes what the losses use: ``beliefs``, ``weights``,
      ``confusion``, ``spread``. ``trust`` and ``noise`` stay.
    metrics: ``(known, predictions, labels) -> dict`` of scalars.
  """

  init: Callable[..., KnownLabels]
  losses: Callable[..., Array]
  ask: Callable[..., KnownLabels]
  metrics: Callable[..., dict[str, Array]]


def robust_labels(
  num_classes: int,
  *,
  exponent: Scalar = 0.45,
  smoothing: Scalar = 0.2,
  belief: Scalar = 0.15,
  sharpness: Scalar = 2.0,
) -> RobustLabels:
  r"""Makes losses that withstand wrong labels, without clean labels or tuning.

  Before training, each label is predicted from all *other* examples, by the features
  that you have (``labels.held_out_beliefs``): pixels, columns of a table, embeddings
  of a pretrained network. Nothing can be memorized there, so the predictions reveal
  which classes are confused and how far each label can be trusted, however fast
  the network memorizes. During training the loss is corrected for the confusion,
  weighted by the trust, and pulled a little to the beliefs. ``ask`` repeats this in the
  features that the network has learned, which are sharper. It compares both
  estimates of the noise and refuses features that have memorized labels.

  .. math::
    \ell_i = w_i \Big( \frac{1 - u_i^q}{q}
      - s \kappa \, \overline{\log p_i} \Big)
      - \beta \delta \sum_c b_i(c) \log p_i(c), \qquad
    u_i = \sum_c p_i(c) \, T[c, y_i], \qquad
    q = q_0 \sigma \kappa \delta, \qquad
    w_i \propto P(y_i \text{ is right})^{\alpha \mu \sigma \kappa \delta}

  :math:`\sigma` is the spread of the wrong labels over classes
  (``labels.confusion_spread``): where each class is mistaken for one other, T says
  everything, and weights and exponent would only hurt. :math:`\mu` is 1 until ``ask``
  is called. It falls to 1/2 where the learned features see as much noise as the
  given ones, so that the network has memorized none of it. :math:`\kappa`, the
  capacity, is 1 until ``ask`` is given the features that ``init`` had. Then the
  network is linear in these d features, and can memorize little: :math:`\kappa` is
  2 d / n, at most 1. :math:`\delta` is 0 where at most 4% of the labels look wrong,
  and 1 from 10% on: the few are hard examples rather than wrong labels. The pull of
  an example without a label is not reduced.

  It helps under random flips, under confusion of certain classes and under labels
  that people got wrong. It hurts where distances between the features mean nothing,
  where copies of an example bear the same wrong label, and a linear head that takes
  few steps on few examples. Labels of which several are right at once (multi-label)
  are refused. For numbers as targets see ``labels.robust_regression_loss``.

  Args:
    num_classes: C, a static Python integer, at least 2.
    exponent: :math:`q_0` in [0, 1]. 0 is the cross-entropy under T; larger ones
      ignore more of what contradicts the network.
    smoothing: s in [0, 1], the pull to the uniform distribution.
    belief: :math:`\beta`, not negative, the pull to the beliefs.
    sharpness: :math:`\alpha`, not negative. 0 weighs all examples alike.

  Returns:
    ``RobustLabels(init, losses, ask, metrics)``:

    * ``init(features, labels, progress=False)``: features ``[n, d]`` of the whole
      training set; labels ``[n]``, integers in [0, C) or names, -1 for none, or
      ``float [n, C]`` for soft labels. See ``labels.held_out_beliefs`` for time and
      memory. On two CPU cores it takes about a second for 10,000 examples, and about
      70 seconds and 3 GiB for a million with 64 features and 100 classes.
      ``progress`` shows a bar (tqdm), but not under ``jax.jit``.
    * ``losses(known, logits, labels, ids)``: logits ``[b, C]``, the labels of the
      batch, and the positions of its examples in the training set. An example with
      the id -1 has the weight one and no belief. Ids may be shuffled, dropped and
      repeated. Take their mean. An example without a label follows its belief.
    * ``ask(known, features, labels, progress=False)``: features of all examples that
      the network has learned, those before its last layer, and all labels. Of a
      linear head these are the features that ``init`` had; never pass those for a
      deeper network. Five times, evenly over training, are enough, and once, after
      half of it, gains nearly as much; any other time is safe. It takes about half a
      second for 10,000 examples, and compiles once under ``jax.jit``. Rows that are
      not finite are left out.
    * ``metrics(known, predictions, labels)``: predictions or logits ``[n, C]`` of all
      examples; see there.

    ``KnownLabels`` is a pytree of arrays: pass it to compiled functions as an
    argument. Its memory is O(n C).

  Guarantees:
    * If every label is trusted, the loss is the cross-entropy.
    * The losses of a batch depend on its examples only, in any order.
    * Asking again compiles nothing.

  Raises:
    ValueError: for arguments out of range, and shapes that do not fit.

  Examples:
    Two clusters of 20 points; the first label is wrong.

    >>> import jax, numpy as np, optax_ranger as ranger
    >>> labels = np.repeat([0, 1], 20)
    >>> noise = 0.3 * np.random.default_rng(0).standard_normal([40, 1])
    >>> points = 3 * labels[:, None] + noise
    >>> labels[0] = 1
    >>> robust = ranger.robust_labels(num_classes=2)
    >>> known = robust.init(points, labels)
    >>> print(known.trust.argmin(), known.trust[0] < 0.2, known.trust[1] > 0.8)
    0 True True
    >>> ids = np.array([0, 1])
    >>> losses = jax.jit(robust.losses)(known, np.zeros([2, 2]), labels[ids], ids)
    >>> print(losses[0] < losses[1])
    True

  References:
    Patrini et al., Making Deep Neural Networks Robust to Label Noise, 2017,
    https://arxiv.org/abs/1609.03683, theorem 2, for the correction; Zhang and
    Sabuncu, Generalized Cross Entropy Loss, 2018, https://arxiv.org/abs/1805.07836,
    equation 6, for the exponent; Cover, Geometrical and Statistical Properties of
    Systems of Linear Inequalities, 1965, https://doi.org/10.1109/PGEC.1965.264137, for
    the 2 d rows that a linear model can memorize; Northcutt et al., Confident Learning,
    2021, https://arxiv.org/abs/1911.00068, for labels judged by held-out predictions.
    The recipe is ours.
  """
  validate.static_count("num_classes", num_classes, least=2)
  validate.in_range("exponent", exponent, 0, 1)
  validate.in_range("smoothing", smoothing, 0, 1)
  for name, value in (("belief", belief), ("sharpness", sharpness)):
    validate.in_range(name, value, 0, float("inf"), open_high=True)

  def init(features: Any, labels: Any, progress: bool = False) -> KnownLabels:
    held_out = labels_lib.held_out_beliefs(
      features, labels, num_classes=num_classes, progress=progress
    )
    given = _given(labels, len(held_out), num_classes)
    known = _judge(held_out, given, None, sharpness, progress)
    return known._replace(projection=_project(jnp.asarray(features)))

  def losses(known: KnownLabels, logits: Any, labels: Any, ids: Any) -> Array:
    logits, ids = jnp.asarray(logits), jnp.asarray(ids)
    if logits.ndim != 2 or logits.shape[1] != num_classes:
      raise ValueError(
        f"logits must have shape [n, {num_classes}], got {list(logits.shape)}."
      )
    validate.integers("ids", ids)
    validate.shape("ids", ids, logits.shape[:1])
    corrected = labels_lib.forward_corrected_loss(
      logits,
      labels,
      known.confusion,
      exponent=numerics.scalar(exponent) * _power(known),
      smoothing=numerics.scalar(smoothing) * known.capacity,
    )
    weights, beliefs = _rows_of(known, ids)
    labeled = _rows.label_rows(labels, logits).any(axis=1)
    doubt = jnp.where(labeled, _doubt(known.noise), jnp.ones_like(weights))
    said = jax.nn.log_softmax(logits.astype(corrected.dtype))
    pull = -(beliefs.astype(said.dtype) * said).sum(axis=1)
    pull = numerics.scalar(belief, pull.dtype) * doubt.astype(pull.dtype) * pull
    return weights.astype(corrected.dtype) * corrected + pull

  def ask(
    known: KnownLabels, features: Any, labels: Any, progress: bool = False
  ) -> KnownLabels:
    features = jnp.asarray(features)
    n = len(known.trust)
    if features.shape[:1] != (n,):
      raise ValueError(
        f"features must have shape [{n}, d], as many rows as `init` had, got"
        f" {list(features.shape)}."
      )
    given = _given(labels, n, num_classes)
    shape, projection = features.shape, _project(features)
    learned = [
      labels_lib.held_out_beliefs(
        _unit(features),
        labels,
        num_classes=num_classes,
        num_random=_RANDOM,
        progress=progress,
      )
    ]
    # Tables of all examples are large: what is popped is held by `_judge` alone.
    del features
    after = _judge(learned.pop(), given, known, sharpness, progress)
    return _unless_given(after, known, projection, shape, given, sharpness)

  def metrics(known: KnownLabels, predictions: Any, labels: Any) -> dict[str, Array]:
    predictions = jnp.asarray(predictions)
    validate.shape("predictions", predictions, known.beliefs.shape)
    given = _given(labels, len(predictions), num_classes)
    return _metrics(known, predictions, given)

  return RobustLabels(init, losses, ask, metrics)


def _given(labels: Any, n: int, num_classes: int) -> Array:
  return replicate(_rows.read(labels, n, num_classes))


@functools.partial(jax.jit, inline=True)
def _unit(features: Array) -> Array:
  """Features of length one: their directions are what the last layer sees.

  Rows that are not finite are NaN.
  """
  if features.ndim != 2:
    raise ValueError(
      f"features must have shape [n, d], got {list(features.shape)}; flatten each"
      " example first."
    )
  features = features.astype(jnp.float32)
  usable = jnp.isfinite(features).all(axis=1, keepdims=True)
  features = jnp.sign(features) * numerics.to_peak(jnp.abs(features))
  length = jnp.linalg.norm(features, axis=1, keepdims=True)
  unit = numerics.divide(features, length)
  return jnp.where(usable, unit, jnp.full_like(unit, jnp.nan))


def _rows_of(known: KnownLabels, ids: Array) -> tuple[Array, Array]:
  """Weights and beliefs of the examples in a batch, split as their ids are."""

  def take(weights, beliefs, ids):
    there = jnp.logical_and(ids >= 0, ids < weights.shape[0])
    places = jnp.where(there, ids, jnp.zeros_like(ids))
    weights = jnp.where(there, weights[places], jnp.ones_like(ids, weights.dtype))
    beliefs = beliefs[places]
    return weights, jnp.where(there[:, None], beliefs, jnp.zeros_like(beliefs))

  # A checkpoint may have given back arrays of NumPy, which traced ids don't index.
  weights, beliefs = jnp.asarray(known.weights), jnp.asarray(known.beliefs)
  return automatic(take, ids, ids)(weights, beliefs, ids)


def _judge(
  held_out: Array,
  given: Array,
  before: KnownLabels | None,
  sharpness: Any,
  progress: bool,
) -> KnownLabels:
  """What new chances of the labels say, beside what was known before."""
  bars = progress and validate.is_known(held_out)
  if before is not None:
    held_out = _mix(held_out, given, before)
  confusion = _confusion(held_out, given)
  if held_out.shape[0]:
    beliefs, right = blocks.map_blocks(
      _posterior, confusion, (held_out, given), _BLOCK, "judging labels" * bars
    )
  else:
    beliefs, right = _posterior(confusion, (held_out, given))
  del held_out
  return _conclude(beliefs, right, confusion, given, before, sharpness)


@functools.partial(jax.jit, inline=True)
def _mix(held_out: Array, given: Array, before: KnownLabels) -> Array:
  """Chances of the labels with those that were known."""
  former = jnp.matmul(before.beliefs, before.confusion, precision="highest")
  return labels_lib.mix_beliefs([held_out, former], given)


@functools.partial(jax.jit, inline=True)
def _confusion(held_out: Array, given: Array) -> Array:
  return labels_lib.label_confusion(given, held_out)


@functools.partial(jax.jit, inline=True)
def _conclude(
  beliefs: Array,
  right: Array,
  confusion: Array,
  given: Array,
  before: KnownLabels | None,
  sharpness: Any,
) -> KnownLabels:
  """What is known now; what was known before, where features have memorized."""
  spread = labels_lib.confusion_spread(confusion)
  labeled = _labeled(given)
  noise = 1 - _mean(right, labeled)
  trust = right
  if before is not None:
    # Learned features may have memorized a label: the given ones have half the say.
    trust = jnp.sqrt(right * before.trust)
  memorizing = jnp.ones_like(noise)
  if before is not None:
    seen = numerics.divide(noise, before.noise)
    memorizing = jnp.clip((_DOES_NOT - seen) / (_DOES_NOT - _MEMORIZES), 0, 1)
  sharpness = numerics.scalar(sharpness) * (1 + memorizing) / 2
  doubt = _doubt(noise if before is None else before.noise)
  weights = _weigh(trust, sharpness * spread * doubt, labeled)
  count, one = jnp.zeros([], jnp.int32), jnp.ones_like(spread)
  if before is None:
    nan = jnp.full([], jnp.nan, jnp.float32)
    return KnownLabels(
      beliefs,
      trust,
      weights,
      confusion,
      spread,
      noise,
      learned_noise=nan,
      believed=count,
      asked=count,
      capacity=one,
      projection=jnp.zeros_like(trust),
    )
  after = before._replace(
    beliefs=beliefs,
    weights=weights,
    confusion=confusion,
    spread=spread,
    learned_noise=noise,
    believed=before.believed + 1,
    asked=before.asked + 1,
    capacity=one,
  )
  refused = before._replace(learned_noise=noise, asked=before.asked + 1)
  memorized = noise < _LEAKED * before.noise
  return jax.tree.map(lambda new, old: jnp.where(memorized, old, new), after, refused)


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _unless_given(
  after: KnownLabels,
  before: KnownLabels,
  projection: Array,
  shape: tuple[int, int],
  given: Array,
  power: Any,
) -> KnownLabels:
  """What was known before, held to less, if the features are those of ``init``."""
  n, columns = shape
  # A linear model of d columns fits any labels of 2 d rows at most (Cover).
  capacity = min(1.0, 2 * columns / max(n, 1))
  linear = before._replace(
    learned_noise=after.learned_noise,
    believed=before.believed + 1,
    asked=after.asked,
    capacity=jnp.full_like(before.capacity, capacity),
  )
  power = numerics.scalar(power) * _power(linear)
  weights = _weigh(before.trust, power, _labeled(given))
  linear = linear._replace(weights=weights)
  apart = jnp.square(projection - before.projection).sum()
  same = apart <= _SAME * jnp.square(before.projection).sum()
  return jax.tree.map(lambda new, old: jnp.where(same, new, old), linear, after)


@functools.partial(jax.jit, inline=True)
def _project(features: Array) -> Array:
  """One number of each row, the same for the same features; zero where not finite."""
  features = features.astype(jnp.float32)
  usable = jnp.isfinite(features).all(axis=1, keepdims=True)
  features = jnp.where(usable, features, jnp.zeros_like(features))
  _, power = jnp.frexp(jnp.abs(features).max(initial=0))
  features = numerics.shift(features, -power)  # Sums of squares stay in range then.
  direction = jax.random.normal(jax.random.key(0), features.shape[1:], jnp.float32)
  return replicate(jnp.matmul(features, direction, precision="highest"))


def _power(known: KnownLabels) -> Array:
  """How much of the exponent and of the weights' power is used, in [0, 1]."""
  return known.spread * known.capacity * _doubt(known.noise)


def _doubt(noise: Array) -> Array:
  """How far labels are doubted, in [0, 1]."""
  return jnp.clip((noise - _CLEAN) / (_NOISY - _CLEAN), 0, 1)


def _labeled(given: Array) -> Array:
  return given >= 0 if given.ndim == 1 else given.any(axis=1)


def _weigh(trust: Array, power: Array, labeled: Array) -> Array:
  weights = trust**power
  weights = numerics.divide(weights, _mean(weights, labeled))
  return jnp.where(labeled, weights, jnp.ones_like(weights))


def _posterior(confusion: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
  """Beliefs in the classes, and the chance that the label is right."""
  rows, labels = block
  beliefs = labels_lib.clean_beliefs(rows, confusion)
  label = _rows.label_rows(labels, beliefs)
  targets = labels_lib.refine_targets(labels, beliefs, confusion=confusion)
  return beliefs, (targets * label).sum(axis=1)


def _mean(values: Array, there: Array) -> Array:
  total = jnp.where(there, values, jnp.zeros_like(values)).sum()
  return numerics.divide(total, there.sum(dtype=jnp.int32).astype(values.dtype))


@jax.jit
def _metrics(known: KnownLabels, predictions: Array, given: Array) -> dict[str, Array]:
  like = jnp.zeros(known.beliefs.shape, jnp.float32)
  label = _rows.label_rows(given, like)
  agrees = jnp.take_along_axis(label, predictions.argmax(axis=1)[:, None], 1)[:, 0]
  contradicted = jnp.logical_and(label.any(axis=1), known.trust < 0.5)
  expected = _mean(known.trust, contradicted)
  agreement = _mean(agrees, contradicted)
  return {
    "noise": known.noise,
    "learned_noise": known.learned_noise,
    "contradicted": contradicted.mean(dtype=jnp.float32),
    "expected_agreement": expected,
    "agreement": agreement,
    "memorized": numerics.divide(jnp.maximum(agreement - expected, 0), 1 - expected),
  }
