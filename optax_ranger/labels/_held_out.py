"""Beliefs about labels from witnesses that have not seen them, and their mixture."""

from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import blocks
from optax_ranger._core import draws
from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.sharding import replicate
from optax_ranger._core.types import Array
from optax_ranger.labels import _rows

# Kernel width, in distances to the fifth neighbor among 2048 examples.
_WIDTH, _NEIGHBOR, _AMONG = 3.0, 5, 2048
# Multiples of the mean eigenvalue, and how sharp the predictions may be.
_RIDGES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)
_SHARPNESSES = tuple(float(s) for s in np.geomspace(1, 45, 16))
_NEIGHBORS = (5, 10, 20, 50)
_WIDE = 128  # dimensions beyond which distances are taken of projections
_BLOCK = 2048  # rows
_KEPT = 2**25  # random features that are kept, 128 MiB, not computed twice
_ROUNDS = 50  # of the mixture, which has converged then


def held_out_beliefs(
  features: Any,
  labels: Any,
  *,
  num_classes: int,
  num_random: int = 512,
  num_keys: int = 2048,
  seed: int = 0,
  progress: bool = False,
) -> Array:
  r"""Predicts the label of each example from all other examples.

  Two witnesses look at the features. A ridge regression on random Fourier features
  of a Gaussian kernel has a closed form for the prediction that it would make of an
  example without that example. The nearest of ``num_keys`` examples vote. Neither
  sees the example's own label, so neither can memorize it. The kernel is better
  where features are many, and neighbors are better where classes are small or
  confused in pairs. The mixture is the one under which the given labels are
  likeliest (``mix_beliefs``), so no clean label is needed. The kernel's ridge and
  sharpness and the number of neighbors, 5 to 50, are chosen in the same way.

  .. math::
    \hat f_{-i}(x_i) = \frac{\hat f(x_i) - h_i \, e_{y_i}}{1 - h_i}, \qquad
    h_i = \phi_i^\top (\Phi^\top \Phi + \lambda I)^{-1} \phi_i, \qquad
    p_i = \mathrm{softmax}(s \hat f_{-i}(x_i))

  It fails where copies of an example bear the same wrong label, and where distances
  between features mean nothing: scale the columns of a table first.

  Args:
    features: ``[n, d]``, of any real type. Rows with a non-finite value are left out.
    labels: ``[n]``, integers in [0, C) or names, or ``float [n, C]`` for soft labels.
      An example without a label is predicted and has no say.
    num_classes: C, a static Python integer.
    num_random: number of random Fourier features, D, a static Python integer.
    num_keys: number of examples that can be neighbors, drawn at random, a static
      Python integer. Fewer are faster, and farther away.
    seed: of both draws, a static Python integer.
    progress: a bar (tqdm) on what takes more than two seconds; not under ``jax.jit``.

  Shapes:
    Time is O(n (D^2 + D C + num_keys d)), memory is O(n (d + C) + D^2) and a block of
    2,048 rows; and up to 128 MiB of random features, so as not to compute them twice.

  Returns:
    ``float32 [n, C]``, P(label | the other examples): rows that sum to one, or zeros
    for a row of features that is not finite. No gradient flows through it.

  Guarantees:
    * The kernel's part equals refitting without the example.
    * An example's row does not depend on its own label, but for the settings.
    * Neither the features nor the labels of non-finite rows affect other rows.

  Raises:
    ValueError: for features that are not 2-D, labels that do not fit.
    TypeError: for complex features, counts that are not Python integers.

  Examples:
    The third of forty points has a wrong label; the others disagree with it.

    >>> import numpy as np, optax_ranger as ranger
    >>> points = np.linspace(-1, 1, 40)[:, None]
    >>> labels = np.repeat([0, 1], 20)
    >>> labels[2] = 1
    >>> beliefs = ranger.labels.held_out_beliefs(points, labels, num_classes=2)
    >>> print(beliefs[2].argmax())
    0

  References:
    Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007; Allen,
    The Relationship between Variable Selection and Data Augmentation and a Method
    for Prediction, 1974, for the leave-one-out form; Bahri et al., Deep k-NN for
    Noisy Labels, 2020, https://arxiv.org/abs/2004.12289, for votes of neighbors.
  """
  for name, value in (
    ("num_classes", num_classes),
    ("num_random", num_random),
    ("num_keys", num_keys),
  ):
    validate.static_count(name, value)
  validate.integer("seed", seed)
  if jnp.ndim(features) != 2 or not jnp.shape(features)[1]:
    raise ValueError(
      "features must have shape [n, d], d at least 1, got"
      f" {list(jnp.shape(features))}; flatten each example first."
    )
  rows = jnp.asarray(features)
  if jnp.issubdtype(rows.dtype, jnp.complexfloating):
    raise TypeError(f"features must be real, got {rows.dtype}.")
  n = rows.shape[0]
  given = replicate(_rows.read(labels, n, num_classes))
  if not n:
    return jnp.zeros([n, num_classes], jnp.float32)
  rows, key = replicate(rows).astype(jnp.float32), draws.key(seed)
  bars = progress and validate.is_known(rows) and validate.is_known(given)
  sizes = _Sizes(num_classes, num_random, min(num_keys, n))
  return jax.lax.stop_gradient(_beliefs(rows, given, key, sizes, bars))


def mix_beliefs(beliefs: Sequence[Any], labels: Any) -> Array:
  r"""Mixes beliefs of several witnesses, so that the given labels are likeliest.

  .. math::
    p_i = \sum_j w_j \, p_{ij}, \qquad
    w = \arg\max_{w \geq 0, \sum_j w_j = 1} \sum_i \sum_y y_i(y) \log p_i(y)

  Noisy labels can judge witnesses as long as none has seen the label it predicts. A
  witness that has memorized labels gets all the weight.

  Args:
    beliefs: arrays ``float [n, C]``, not negative, of any scale. A row of zeros, or
      one that is not finite, is no belief: the others take its place.
    labels: ``[n]``, integers in [0, C) or names, or ``float [n, C]`` for soft labels.

  Returns:
    ``float32 [n, C]`` (float64 for such beliefs): rows that sum to one, or zeros
    where no witness has a belief. No gradient flows through it.

  Guarantees:
    * The weights are those of the greatest likelihood.

  Raises:
    ValueError: for no beliefs, or shapes that do not fit.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> good = jnp.array([[0.75, 0.25], [0.25, 0.75]])
    >>> bad = jnp.array([[0.5, 0.5], [0.5, 0.5]])
    >>> print(ranger.labels.mix_beliefs([good, bad], jnp.array([0, 1])).round(2))
    [[0.75 0.25]
     [0.25 0.75]]
  """
  if not len(beliefs):
    raise ValueError("beliefs must hold at least one array [n, C], got none.")
  tables = [jnp.asarray(table) for table in beliefs]
  _rows.distributions("beliefs", tables[0][:0])  # Refuses other shapes.
  for table in tables[1:]:
    validate.shape("beliefs", table, tables[0].shape)
  given = _rows.read(labels, *tables[0].shape)
  return jax.lax.stop_gradient(_mixture(tables, given))


def clean_beliefs(beliefs: Any, confusion: Any, *, steps: int = 30) -> Array:
  r"""Turns chances of the *label* into chances of the *class*.

  Beliefs that were learned from noisy labels predict noisy labels. The chances of
  the classes are those that explain them under the confusion matrix, by expectation
  maximization from the beliefs themselves:

  .. math::
    p_i(y) \approx \sum_c b_i(c) \, T[c, y], \qquad
    b_i(c) \leftarrow b_i(c) \sum_y \frac{p_i(y) \, T[c, y]}{\sum_j b_i(j) \, T[j, y]}

  Args:
    beliefs: ``float [n, C]``, chances of the labels, such as ``held_out_beliefs``.
    confusion: ``float [C, C]``, T[c, y], the chance of each label given the class.
    steps: number of rounds, a static Python integer. Few rounds keep what is certain
      and leave the rest smooth.

  Returns:
    ``float32 [n, C]`` (float64 for such beliefs): rows that sum to one, or zeros
    where there is no belief. No gradient flows through it.

  Guarantees:
    * With the identity they are the beliefs.
    * Passed through the confusion, they give the beliefs, where any clean beliefs do.

  Raises:
    ValueError: for shapes that do not fit.
    TypeError: for steps that are not a Python integer.

  Examples:
    A third of class 0 is called 1. A label that is 0 in two of three cases is of
    class 0.

    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> confusion = jnp.array([[2 / 3, 1 / 3], [0.0, 1.0]])
    >>> beliefs = jnp.array([[2 / 3, 1 / 3], [0.0, 1.0]])
    >>> print(ranger.labels.clean_beliefs(beliefs, confusion).round(1) + 0.0)
    [[1. 0.]
     [0. 1.]]

  References:
    Richardson, Bayesian-Based Iterative Method of Image Restoration, 1972.
  """
  validate.static_count("steps", steps)
  rows, confusion = _rows.distributions("beliefs", beliefs), jnp.asarray(confusion)
  validate.shape("confusion", confusion, (rows.shape[1],) * 2)
  confusion = _rows.normalized(confusion.astype(rows.dtype))
  return jax.lax.stop_gradient(_explained(rows, confusion, steps))


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _explained(rows: Array, confusion: Array, steps: int) -> Array:
  def explain(clean, _):
    chances = jnp.matmul(clean, confusion, precision="highest")
    ratio = numerics.divide(rows, chances)
    clean = clean * jnp.matmul(ratio, confusion.T, precision="highest")
    return _rows.normalized(clean), None

  return jax.lax.scan(explain, rows, length=steps)[0]


@functools.partial(jax.jit, inline=True)
def _mixture(tables: list[Array], given: Array) -> Array:
  tables, given = [replicate(table) for table in tables], replicate(given)
  if not len(given):
    return _rows.distributions("beliefs", tables[0])
  said, usable = blocks.map_blocks(_read_and_say, None, (tables, given), _BLOCK)
  weights = _likeliest(said, usable)
  return blocks.map_blocks(_read_and_mix, weights, tables, _BLOCK)


def _read_and_say(_: None, block: tuple[list[Array], Array]) -> tuple[Array, Array]:
  tables, given = block
  tables = [_rows.distributions("beliefs", table) for table in tables]
  return _say(tables, _rows.label_rows(given, tables[0]))


def _read_and_mix(weights: Array, tables: list[Array]) -> Array:
  return _mix([_rows.distributions("beliefs", table) for table in tables], weights)


def _say(tables: list[Array], label: Array) -> tuple[Array, Array]:
  """The chance that each witness gave each label, [n, J], and who can judge, [n]."""
  said = jnp.stack([(table * label).sum(axis=1) for table in tables], axis=1)
  there = jnp.stack([table.any(axis=1) for table in tables], axis=1)
  # Judged where all have a belief.
  return said, jnp.logical_and(label.any(axis=1), there.all(axis=1))


def _likeliest(said: Array, usable: Array) -> Array:
  """Weights of witnesses under which the labels are likeliest, [J]."""
  said = said.T

  def climb(weights, _):
    shares = weights[:, None] * said
    shares = numerics.divide(shares, shares.sum(axis=0, keepdims=True))
    total = jnp.where(usable[None], shares, jnp.zeros_like(shares)).sum(axis=1)
    climbed = numerics.divide(total, total.sum(keepdims=True))
    return jnp.where(total.any(keepdims=True), climbed, weights), None

  start = jnp.full([len(said)], 1 / len(said), said.dtype)
  return jax.lax.scan(climb, start, length=_ROUNDS)[0]


def _mix(tables: list[Array], weights: Array) -> Array:
  """The weighted mean; where a witness has no belief, that of the others."""
  mixed = [weight * table for weight, table in zip(weights, tables, strict=True)]
  mixed = _rows.normalized(functools.reduce(jnp.add, mixed))
  plain = _rows.normalized(functools.reduce(jnp.add, tables))
  return jnp.where(mixed.any(axis=1, keepdims=True), mixed, plain)


class _Sizes(NamedTuple):
  """Numbers of classes, of random features, and of keys."""

  classes: int
  random: int
  keys: int


def _beliefs(
  rows: Array,
  labels: Array,
  key: Array,
  sizes: "_Sizes",
  bars: bool,
) -> Array:
  view, near, block, origin = _prepare(rows, labels, key, sizes)
  d, c = sizes.random, sizes.classes
  if rows.shape[0] * d <= _KEPT:
    block = blocks.map_blocks(_look, view, block, _BLOCK)
  start, shapes = jnp.zeros([], rows.dtype), ([d], [c], [d, d], [d, c])
  sums = tuple(jnp.broadcast_to(start, shape) for shape in shapes)
  learned = blocks.fold_blocks(
    _learn, (view, origin), sums, block, _BLOCK, "learning labels" * bars
  )
  chosen = _choose(near, origin, learned, block.taught.sum(dtype=jnp.int32))
  mixed = blocks.map_blocks(
    _predict, (view, chosen), block, _BLOCK, "predicting labels" * bars
  )
  return _of_finite(mixed, rows)


@functools.partial(jax.jit, inline=True)
def _of_finite(beliefs: Array, rows: Array) -> Array:
  alive = jnp.isfinite(rows).all(axis=1, keepdims=True)
  return jnp.where(alive, beliefs, jnp.zeros_like(beliefs))


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _prepare(
  rows: Array,
  labels: Array,
  key: Array,
  sizes: "_Sizes",
) -> "tuple[_View, _Near, _Block, Array]":
  """How blocks are seen, the keys, all examples, and a mean that is nearly theirs."""
  alive = jnp.isfinite(rows).all(axis=1)
  rows = jnp.where(alive[:, None], rows, jnp.zeros_like(rows))
  count = jnp.maximum(alive.sum(dtype=jnp.int32), 1).astype(rows.dtype)
  rows = rows - (rows / count).sum(axis=0, keepdims=True)
  rows = rows / jnp.maximum(jnp.abs(rows).max(), jnp.finfo(rows.dtype).tiny)
  rows = jnp.where(alive[:, None], rows, jnp.zeros_like(rows))
  taught = jnp.logical_and(alive, _has_label(labels, sizes.classes))
  drawn, waves, phases = jax.random.split(key, 3)
  # Examples that can't teach come last, and are keys only if there are no others.
  order = jax.random.uniform(drawn, [rows.shape[0]], rows.dtype)
  some = jax.lax.top_k(-jnp.where(taught, order, order + 1), sizes.keys)[1]
  width = _width(rows[some[:_AMONG]], taught[some[:_AMONG]])
  normals = jax.random.normal(waves, [rows.shape[1], sizes.random], rows.dtype)
  shifts = jax.random.uniform(phases, [sizes.random], rows.dtype, maxval=2 * np.pi)
  view = _View(normals / width, shifts, jnp.arange(sizes.classes, dtype=jnp.int32))
  keys = view(_Block(rows[some], labels[some], taught[some], some))
  ids = jnp.arange(rows.shape[0], dtype=jnp.int32)
  # Near the mean already, so that centering afterwards loses no digits.
  origin = keys.table.mean(axis=0)
  return view, _Near.of(keys), _Block(rows, labels, taught, ids), origin


def _learn(shared: Any, sums: Any, block: Any) -> Any:
  """Adds a block to the sums of features and labels, and of their products."""
  view, origin = shared
  seen = _look(view, block)
  table = seen.table - origin[None]
  table = jnp.where(seen.taught[:, None], table, jnp.zeros_like(table))
  found = (
    table.sum(axis=0),
    seen.label.sum(axis=0),
    _product(table.T, table),
    _product(table.T, seen.label),
  )
  return jax.tree.map(jnp.add, sums, found)


@functools.partial(jax.jit, inline=True)
def _choose(near: "_Near", origin: Array, learned: Any, taught: Array) -> "_Chosen":
  """What makes the labels of the keys likeliest: they are known, as far as any are."""
  keys, kernel = near.keys, _Kernel.of(origin, learned, taught)
  place = jnp.stack([_likelihood(one, keys.label) for one in near.ask(keys)]).argmax()
  ridges = jnp.asarray(_RIDGES, origin.dtype)
  sharpnesses = jnp.asarray(_SHARPNESSES, origin.dtype)

  def judge(ridge):
    said = kernel.fit(ridge).predict(keys)
    sharp = lambda s: _likelihood(jax.nn.softmax(s * said), keys.label)
    likelihoods = jax.lax.map(sharp, sharpnesses)
    # Rounding may leave no factor for the smallest ridges.
    return jnp.where(jnp.isfinite(likelihoods), likelihoods, -jnp.inf)

  best = jax.lax.map(judge, ridges).argmax()
  sharpness = sharpnesses[best % len(sharpnesses)]
  fit = kernel.fit(ridges[best // len(sharpnesses)])
  even = jnp.full([2], 0.5, origin.dtype)
  chosen = _Chosen(fit, sharpness, near, place, even)
  weights = _likeliest(*_say(chosen.witnesses(keys), keys.label))
  return chosen._replace(weights=weights)


def _predict(shared: Any, block: Any) -> Array:
  view, chosen = shared
  return _mix(chosen.witnesses(_look(view, block)), chosen.weights)


class _Block(NamedTuple):
  """Some examples: rows [b, d], labels, whether they teach, and which they are."""

  rows: Array
  labels: Array
  taught: Array
  ids: Array


def _has_label(labels: Array, num_classes: int) -> Array:
  if labels.ndim == 1:
    return jnp.logical_and(labels >= 0, labels < num_classes)
  return labels.any(axis=1)


class _Seen(NamedTuple):
  """A block as both witnesses see it.

  Attributes:
    points: ``[b, d']``, for distances.
    table: ``[b, D]``, random features.
    label: ``[b, C]``, zeros for examples that don't teach.
    taught: ``[b]``.
    ids: ``[b]``.
  """

  points: Array
  table: Array
  label: Array
  taught: Array
  ids: Array


class _View(NamedTuple):
  """Sees blocks.

  Attributes:
    normals: ``[d, D]``, of the random features.
    shifts: ``[D]``, of the random features.
    classes: ``[C]``, 0, 1, ...
  """

  normals: Array
  shifts: Array
  classes: Array

  def __call__(self, block: _Block) -> _Seen:
    label = block.labels
    if label.ndim == 1:
      label = (label[:, None] == self.classes[None]).astype(block.rows.dtype)
    label = jnp.where(block.taught[:, None], label, jnp.zeros_like(label))
    projected = _product(block.rows, self.normals)
    points = block.rows
    if points.shape[1] > _WIDE <= projected.shape[1]:
      # Random projections keep distances within a few percent.
      points = projected[:, :_WIDE]
    table = jnp.cos(projected + self.shifts[None])
    return _Seen(points, table, label, block.taught, block.ids)


def _look(view: _View, block: "_Block | _Seen") -> _Seen:
  """A block as witnesses see it, if it is not that already."""
  return block if isinstance(block, _Seen) else view(block)


def _width(rows: Array, there: Array) -> Array:
  """The kernel's, from the median distance to the fifth neighbor among some rows."""
  squares = (rows * rows).sum(axis=1)
  distances = squares[:, None] + squares[None] - 2 * _product(rows, rows.T)
  themselves = jnp.eye(rows.shape[0], dtype=bool)
  left_out = jnp.logical_or(themselves, jnp.logical_not(there)[None])
  distances = jnp.where(left_out, jnp.inf, jnp.maximum(distances, 0))
  place = min(_NEIGHBOR, rows.shape[0]) - 1
  # Unless both results are kept, XLA sorts whole rows on CPUs: 60 times the time.
  top, _ = jax.lax.optimization_barrier(jax.lax.top_k(-distances, place + 1))
  nearest = -top[:, place]
  usable = jnp.logical_and(there, jnp.isfinite(nearest))
  width = jnp.sqrt(jnp.nanmedian(jnp.where(usable, nearest, jnp.nan)))
  # Without neighbors at a distance, such as one point, any width does.
  return jnp.where(width > 0, _WIDTH * width, jnp.ones_like(width))


def _product(a: Array, b: Array) -> Array:
  """A product in full float32, where an accelerator would round its inputs."""
  return jnp.matmul(a, b, precision="highest")


class _Near(NamedTuple):
  """Votes of the nearest of some examples.

  Attributes:
    keys: those examples.
    shares: ``[1, C]``, of each class, one vote that all examples get.
  """

  keys: _Seen
  shares: Array

  @classmethod
  def of(cls, keys: _Seen) -> "_Near":
    shares = keys.label.sum(axis=0, keepdims=True) + 1 / keys.label.shape[1]
    return cls(keys, shares / shares.sum())

  @property
  def counts(self) -> tuple[int, ...]:
    """How many neighbors may be asked; an example is no neighbor of its own."""
    most = max(len(self.keys.ids) - 1, 1)
    return tuple(sorted({min(k, most) for k in _NEIGHBORS}))

  def ask(self, seen: _Seen) -> list[Array]:
    """The votes by each number of neighbors, [b, C] each."""
    keys = self.keys
    squares = (keys.points * keys.points).sum(axis=1)
    nearness = 2 * _product(seen.points, keys.points.T) - squares[None]
    themselves = keys.ids[None] == seen.ids[:, None]
    left_out = jnp.logical_or(themselves, jnp.logical_not(keys.taught)[None])
    nearness = jnp.where(left_out, -jnp.inf, nearness)
    nearest = jax.lax.top_k(nearness, self.counts[-1])
    top, places = jax.lax.optimization_barrier(nearest)
    votes = keys.label[places]
    votes = jnp.where(jnp.isfinite(top)[..., None], votes, jnp.zeros_like(votes))
    sums, found, before = self.shares, [], 0
    for k in self.counts:
      sums, before = sums + votes[:, before:k].sum(axis=1), k
      found.append(_rows.normalized(sums))
    return found


class _Kernel(NamedTuple):
  """A ridge regression on random Fourier features, but for its ridge.

  Attributes:
    center: ``[D]``, the mean of the features.
    means: ``[1, C]``, of the labels.
    count: number of examples that teach.
    gram: ``[D, D]``, of centered features.
    moments: ``[D, C]``, of centered features and labels.
  """

  center: Array
  means: Array
  count: Array
  gram: Array
  moments: Array

  @classmethod
  def of(cls, origin: Array, learned: Any, taught: Array) -> "_Kernel":
    """Of what `_learn` has summed up, relative to an origin."""
    table, means, gram, moments = learned
    count = jnp.maximum(taught, 1).astype(origin.dtype)
    means, offset = means / count, table / count
    gram = gram - table[:, None] * offset[None]
    moments = moments - table[:, None] * means[None]
    return cls(origin + offset, means[None], count, gram, moments)

  def fit(self, ridge: Array) -> "_Fit":
    """With a ridge, in units of the mean eigenvalue."""
    mean = jnp.diagonal(self.gram).mean()
    # Examples that are all alike teach nothing but the mean of the labels.
    mean = jnp.where(mean > 0, mean, jnp.ones_like(mean))
    identity = jnp.eye(len(self.gram), dtype=mean.dtype)
    lower = jnp.linalg.cholesky(self.gram + ridge * mean * identity)
    weights = jax.scipy.linalg.cho_solve((lower, True), self.moments)
    return _Fit(self, lower, weights)


class _Fit(NamedTuple):
  """A ridge regression: a Cholesky factor ``[D, D]`` and weights ``[D, C]``."""

  kernel: _Kernel
  lower: Array
  weights: Array

  def predict(self, seen: _Seen) -> Array:
    """What a fit without each example says of it, [b, C]."""
    kernel = self.kernel
    table = seen.table - kernel.center[None]
    fitted = _product(table, self.weights)
    half = jax.scipy.linalg.solve_triangular(self.lower, table.T, lower=True)
    # The mean of the labels has seen each example too.
    leverage = (half * half).sum(axis=0)[:, None] + 1 / kernel.count
    leverage = jnp.where(seen.taught[:, None], leverage, jnp.zeros_like(leverage))
    left = seen.label - kernel.means
    return (fitted - leverage * left) / jnp.maximum(1 - leverage, 1e-3) + kernel.means


class _Chosen(NamedTuple):
  """Both witnesses with their settings.

  Attributes:
    fit: the kernel's.
    sharpness: of its predictions.
    near: the neighbors.
    place: how many of them, as an index.
    weights: ``[2]``, of the mixture.
  """

  fit: _Fit
  sharpness: Array
  near: _Near
  place: Array
  weights: Array

  def witnesses(self, seen: _Seen) -> list[Array]:
    said = jax.nn.softmax(self.sharpness * self.fit.predict(seen))
    return [said, jnp.stack(self.near.ask(seen))[self.place]]


def _likelihood(beliefs: Array, label: Array) -> Array:
  """The logarithm of the chance of all labels."""
  said = (beliefs * label).sum(axis=1)
  tiny = jnp.finfo(said.dtype).tiny
  logs = jnp.log(jnp.maximum(said, tiny))
  return jnp.where(label.any(axis=1), logs, jnp.zeros_like(logs)).sum()
