"""What people do against noise, and what Ranger has: each as a function of a run.

All take the same steps with the same optimizer: gradients clipped to norm 1, weight
decay, Nesterov's momentum. Each has three settings, nothing else is tuned.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _noise
import optax_ranger as ranger

ROUNDS, BATCH, WIDTH = 40, 32, 64
# Passes over the rows in a round.
_PASSES = {
  "digits": 1,
  "breast_cancer": 2,
  "wine": 4,
  "diabetes": 2,
  "friedman1": 1,
}
_RATE, _EMA, _DECAY, _MEMORY = 0.05, 0.99, 1e-3, 0.7
_MOST_NEIGHBORS = 20

Settings = dict[str, float]


class Run(NamedTuple):
  """One training: the data, the rows of all steps and the parameters to start with.

  Attributes:
    data: what `_noise.load` gives.
    ids: ``int [rounds, steps, batch]``.
    params: of the network.
    classes: how many; 0 for targets that are numbers.
  """

  data: _noise.Data
  ids: jax.Array
  params: Any
  classes: int

  @property
  def there(self) -> jax.Array:
    """Which training rows are not there to fill up."""
    return jnp.arange(len(self.data.x)) < self.data.count


class Fitted(NamedTuple):
  """A trained network, and how it did after every round."""

  params: Any
  state: Any
  memory: Any
  valid: jax.Array
  test: jax.Array

  @property
  def mean(self) -> Any:
    return ranger.eval_params(self.state, self.params)

  @property
  def curves(self) -> tuple[jax.Array, jax.Array]:
    return self.valid, self.test


def features(params: Any, x: jax.Array) -> jax.Array:
  for kernel, bias in params[:-1]:
    x = jax.nn.relu(x @ kernel + bias)
  return x


def outputs(params: Any, x: jax.Array) -> jax.Array:
  kernel, bias = params[-1]
  return features(params, x) @ kernel + bias


def start(problem: str, data: _noise.Data, seed: int, rounds: int = ROUNDS) -> Run:
  """The same parameters and as many steps for every method and kind of noise."""
  classes = 0 if _noise.task(problem) == "numbers" else int(data.test_y.max()) + 1
  rng = np.random.default_rng(seed)
  sizes = (data.x.shape[1], WIDTH, classes or 1)
  params = [
    (
      (rng.standard_normal([i, o]) * np.sqrt(2 / i)).astype(np.float32),
      np.zeros(o, np.float32),
    )
    for i, o in zip(sizes[:-1], sizes[1:], strict=True)
  ]
  clean = len(data.x) // (2 if classes else 1)
  steps = clean * _PASSES[problem] // BATCH
  count, orders = int(data.count), []
  for _ in range(-(-rounds * steps * BATCH // count)):
    orders.append(rng.permutation(count))
  ids = np.concatenate(orders)[: rounds * steps * BATCH].reshape(rounds, steps, BATCH)
  return Run(data, ids.astype(np.int32), params, classes)


def fit(
  run: Run,
  losses: Callable[..., Any],
  *,
  rate: Any = _RATE,
  ema: float | None = _EMA,
  step: Any = None,
  weights: Any = None,
  ids: Any = None,
  warm: Fitted | None = None,
) -> Fitted:
  """Trains; goes on from `warm`, where it is given.

  Args:
    run: the data and the start.
    losses: ``(outputs, y, smoothed) -> losses [n]``.
    rate: the learning rate.
    ema: the decay of smoothed parameters; None evaluates the last ones.
    step: over the per-example gradients; None for their mean.
    weights: of the training rows; None for equal ones.
    ids: rows of the steps; None for all.
    warm: what was trained before.
  """
  data = run.data
  step = ranger.aggregate_by_mean() if step is None else step
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.add_decayed_weights(_DECAY),
    optax.sgd(rate, momentum=0.9, nesterov=True),
    *([] if ema is None else [ranger.smooth_by_ema(ema)]),
  )
  table = ranger.smooth_predictions(len(data.x), max(run.classes, 1), _MEMORY)
  weights = jnp.ones(len(data.x)) if weights is None else weights

  def per_example(params, batch, smoothed):
    out = outputs(params, batch["x"])
    return losses(out, batch["y"], smoothed), jax.lax.stop_gradient(out)

  grad_fn = ranger.value_and_grad(
    per_example, step, has_aux=True, micro_batch_size=BATCH
  )

  def update(carry, ids):
    params, state, memory = carry
    batch = {"x": jnp.asarray(data.x)[ids], "y": jnp.asarray(data.y)[ids]}
    smoothed = ranger.smoothed_predictions(memory, ids)
    (_, out), grads = grad_fn(
      params, batch, smoothed=smoothed, member_weights=weights[ids]
    )
    updates, state = tx.update(grads, state, params)
    if run.classes:
      _, memory = table.update(
        {}, memory, predictions=jax.nn.softmax(out), example_ids=ids
      )
    return (optax.apply_updates(params, updates), state, memory), None

  def one_round(carry, ids):
    carry, _ = jax.lax.scan(update, carry, ids)
    params = ranger.eval_params(carry[1], carry[0])
    return carry, (
      validation(params, data.valid_x, data.valid_y, run.classes),
      score(params, data.test_x, data.test_y, run.classes),
    )

  if warm is None:
    carry = run.params, tx.init(run.params), table.init({})
  else:
    carry = warm.params, warm.state, warm.memory
  carry, (valid, test) = jax.lax.scan(one_round, carry, run.ids if ids is None else ids)
  if warm is not None:
    valid, test = (
      jnp.concatenate([warm.valid, valid]),
      jnp.concatenate([warm.test, test]),
    )
  return Fitted(*carry, valid, test)


def score(params: Any, x: Any, y: Any, classes: int) -> jax.Array:
  """Accuracy, or the share of the variance that is explained."""
  out = outputs(params, x)
  if classes:
    return (out.argmax(axis=1) == y).mean()
  return 1 - ((out[:, 0] - y) ** 2).mean() / jnp.var(y)


def validation(params: Any, x: Any, y: Any, classes: int) -> jax.Array:
  """Accuracy, or minus the logarithm of the mean absolute error, where rows are."""
  there = jnp.isfinite(x).all(axis=1)
  out = outputs(params, jnp.where(there[:, None], x, 0))
  if classes:
    return jnp.mean(out.argmax(axis=1) == y, where=there)
  error = jnp.abs(out[:, 0] - jnp.where(there, y, 0))
  return -jnp.log(jnp.mean(error, where=there))


def cross_entropy(logits: jax.Array, y: jax.Array, smoothed: Any = None) -> jax.Array:
  del smoothed
  return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def squared(out: jax.Array, y: jax.Array, smoothed: Any = None) -> jax.Array:
  del smoothed
  return 0.5 * (out[:, 0] - y) ** 2


def _usual(run: Run) -> Callable[..., jax.Array]:
  return cross_entropy if run.classes else squared


def plain(run: Run, settings: Settings) -> Fitted:
  return fit(run, _usual(run), ema=None, **settings)


def averaged(run: Run, settings: Settings) -> Fitted:
  return fit(run, _usual(run), **settings)


def sce(run: Run, settings: Settings) -> Fitted:
  """Symmetric cross-entropy, arXiv:1908.06112; the logarithm of 0 is -4."""

  def losses(logits, y, smoothed):
    reverse = 4 * (1 - _chance(logits, y))
    return settings["alpha"] * cross_entropy(logits, y) + settings["beta"] * reverse

  return fit(run, losses)


def gce(run: Run, settings: Settings) -> Fitted:
  """Generalized cross-entropy, arXiv:1805.07836."""
  q = settings["q"]
  return fit(run, lambda out, y, _: (1 - _chance(out, y) ** q) / q)


def elr(run: Run, settings: Settings) -> Fitted:
  return fit(run, _with_elr(settings["lambda"]))


def huber(run: Run, settings: Settings) -> Fitted:
  # Scaled so that small errors have the slope of the squared loss's.
  delta = settings["delta"]
  return fit(run, lambda out, y, _: optax.huber_loss(out[:, 0], y, delta))


def filtered(run: Run, settings: Settings) -> Fitted:
  """Drops the rows that most of their neighbors contradict, and trains.

  Of classes, neighbors in the logits of a first net trained for a quarter of the
  rounds (arXiv:2004.12289); of numbers, neighbors in the features, and a row is
  dropped whose target is many median deviations away from their median.
  """
  if run.classes:
    first = fit(run, cross_entropy, ids=run.ids[: len(run.ids) // 4])
    logits = outputs(first.mean, run.data.x)
    neighbors = _nearest(logits, settings["k"])
    kept = ranger.label_support(neighbors, run.data.y) >= 0.5
  else:
    neighbors = ranger.nearest_neighbors(run.data.x, k=10)
    y = jnp.asarray(run.data.y)
    away = jnp.abs(y - jnp.median(y[neighbors.indices], axis=1))
    kept = away <= settings["deviations"] * jnp.median(away)
  weights = jnp.where(kept, 1.0, 0.0)
  return fit(run, _usual(run), weights=weights)


def neighbor_weights(run: Run, settings: Settings) -> Fitted:
  """Ranger's steps 1 and 4: rows that their neighbors back count more."""
  return fit(run, _usual(run), weights=_backed(run, settings))


def neighbor_weights_elr(run: Run, settings: Settings) -> Fitted:
  """The same, with ELR on top: the recipe of the README."""
  return fit(run, _with_elr(settings["lambda"]), weights=_backed(run, settings))


def corrected(run: Run, settings: Settings) -> Fitted:
  """After a warm-up, which class is mistaken for which, told by neighbors."""
  early = max(1, len(run.ids) // 6)
  first = fit(run, cross_entropy, ids=run.ids[:early])
  neighbors = _nearest(features(first.mean, run.data.x), settings["k"], "cosine")
  beliefs = ranger.smoothed_predictions(first.memory)
  beliefs = ranger.neighbor_beliefs(neighbors, beliefs)
  confusion = ranger.label_confusion(run.data.y, beliefs, sharpness=8.0)
  q = settings["exponent"]

  def losses(logits, y, smoothed):
    chance = (jax.nn.softmax(logits) * confusion[:, y].T).sum(axis=1)
    spread = -jax.nn.log_softmax(logits).mean(axis=1)
    return (1 - jnp.maximum(chance, 1e-6) ** q) / q + 0.1 * spread

  return fit(run, losses, ids=run.ids[early:], warm=first)


def _robust(make: Callable[[Settings], Any]) -> Callable[[Run, Settings], Fitted]:
  def method(run, settings):
    rate = settings.get("rate", _RATE)
    return fit(run, _usual(run), rate=rate, step=make(settings))

  return method


def _chance(logits: jax.Array, y: jax.Array) -> jax.Array:
  chance = jnp.take_along_axis(jax.nn.softmax(logits), y[:, None], axis=1)[:, 0]
  return jnp.maximum(chance, 1e-6)


def _with_elr(factor: Any) -> Callable[..., jax.Array]:
  def losses(logits, y, smoothed):
    term = ranger.early_learning_regularizer(logits, smoothed)
    return cross_entropy(logits, y) + factor * term

  return losses


def _nearest(rows: jax.Array, k: Any, metric: str = "euclidean") -> ranger.Neighbors:
  """Neighbors of which the first k have weight: one program whatever k is."""
  found = ranger.nearest_neighbors(rows, k=_MOST_NEIGHBORS, metric=metric)
  return _first(found, k)


def _first(neighbors: ranger.Neighbors, k: Any) -> ranger.Neighbors:
  used = jnp.arange(neighbors.weights.shape[1]) < k
  weights = jnp.where(used, neighbors.weights * (_MOST_NEIGHBORS / k), 0)
  return neighbors._replace(weights=weights)


def _backed(run: Run, settings: Settings) -> jax.Array:
  """Of classes, neighbors that agree; of numbers, neighbors in row and target.

  With a Gaussian kernel, a row far from all others has no weight.
  """
  x, y = jnp.asarray(run.data.x), jnp.asarray(run.data.y)
  if not run.classes:
    x = jnp.concatenate([x, settings["target_scale"] * y[:, None]], axis=1)
  found = ranger.nearest_neighbors(x, k=_MOST_NEIGHBORS)
  filled = jnp.where(found.indices >= 0, found.distances, jnp.nan)
  weigh = lambda kernel: (
    ranger.weigh_neighbors(
      found,
      kernel=kernel,
      bandwidth=jnp.nanmedian(filled),
      labels=run.data.y if run.classes else None,
    ).weights
  )
  gaussian = settings.get("gaussian", 1.0) > 0
  weights = jnp.where(gaussian, weigh("gaussian"), weigh("uniform"))
  neighbors = _first(found._replace(weights=weights), settings.get("k", 20.0))
  head = ranger.ranger_head(include_self=False)
  weights = ranger.example_weights(
    head, len(x), neighbors=neighbors, member_weights=jnp.where(run.there, 1.0, 0.0)
  )
  return weights


class Method(NamedTuple):
  """A way to train.

  Attributes:
    run: ``(run, settings) -> Fitted``, traceable in the settings.
    settings: what is tried.
    tasks: on which tasks.
    noises: on which kinds of noise; None for all.
    problems: on which problems; None for all.
  """

  run: Callable[[Run, Settings], Fitted]
  settings: tuple[Settings, ...]
  tasks: tuple[str, ...] = ("classes", "numbers")
  noises: tuple[str, ...] | None = None
  problems: tuple[str, ...] | None = None

  def suits(self, problem: str, noise: str) -> bool:
    return (
      _noise.task(problem) in self.tasks
      and (self.noises is None or noise in self.noises)
      and (self.problems is None or problem in self.problems)
    )


def _each(name: str, *values: float, **fixed: float) -> tuple[Settings, ...]:
  return tuple({name: value, **fixed} for value in values)


_CLASSES, _NUMBERS = ("classes",), ("numbers",)
_RATES = _each("rate", 0.02, 0.05, 0.1)
_BAD_ROWS = ("none", "outlier features", "heavy tails", "gross errors")
# Sorting every example's gradient takes a hundred times a plain step.
_SMALL = ("wine", "diabetes", "friedman1")
_TRIMMED = _robust(lambda s: ranger.aggregate_by_trimmed_mean(s["fraction"]))
_GEOMETRIC = _robust(lambda s: ranger.aggregate_by_geometric_median())
METHODS = {
  "plain": Method(plain, _RATES),
  "EMA": Method(averaged, _RATES),
  "SCE, EMA": Method(
    sce,
    (
      {"alpha": 0.1, "beta": 1.0},
      {"alpha": 1.0, "beta": 1.0},
      {"alpha": 0.1, "beta": 0.3},
    ),
    _CLASSES,
  ),
  "GCE, EMA": Method(gce, _each("q", 0.3, 0.5, 0.7), _CLASSES),
  "ELR, EMA": Method(elr, _each("lambda", 1.0, 3.0, 7.0), _CLASSES),
  "k-NN filter, EMA": Method(filtered, _each("k", 5.0, 10.0, 20.0), _CLASSES),
  "Huber, EMA": Method(huber, _each("delta", 0.1, 0.3, 1.0), _NUMBERS),
  "neighbor filter, EMA": Method(
    filtered, _each("deviations", 2.0, 3.0, 5.0), _NUMBERS
  ),
  "Ranger: neighbor weights": Method(
    neighbor_weights,
    (
      {"k": 10.0, "gaussian": 0.0},
      {"k": 10.0, "gaussian": 1.0},
      {"k": 20.0, "gaussian": 1.0},
    ),
    _CLASSES,
  ),
  "Ranger: neighbor weights, ELR": Method(
    neighbor_weights_elr,
    _each("lambda", 1.0, 3.0, 7.0, k=10.0, gaussian=1.0),
    _CLASSES,
  ),
  "Ranger: confusion": Method(
    corrected,
    (
      {"k": 20.0, "exponent": 0.3},
      {"k": 10.0, "exponent": 0.3},
      {"k": 20.0, "exponent": 0.7},
    ),
    _CLASSES,
  ),
  "Ranger: neighbors in row and target": Method(
    neighbor_weights, _each("target_scale", 1.0, 2.0, 4.0), _NUMBERS
  ),
  # Near 0.5 it is the median, entry by entry.
  "Ranger: trimmed mean": Method(
    _TRIMMED, _each("fraction", 0.1, 0.25, 0.45), noises=_BAD_ROWS, problems=_SMALL
  ),
  "Ranger: geometric median": Method(
    _GEOMETRIC, _RATES, noises=_BAD_ROWS, problems=(*_SMALL, "breast_cancer")
  ),
}


def run_all(method: Method, runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
  """Validation and test after every round, each ``[settings, runs, rounds]``."""
  stacked = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *[run._replace(classes=()) for run in runs]
  )
  grid = {
    name: jnp.asarray([one[name] for one in method.settings])
    for name in method.settings[0]
  }
  valid, test = _program(method.run, runs[0].classes)(grid, stacked)
  return np.asarray(valid), np.asarray(test)


_PROGRAMS: dict[Any, Any] = {}


def _program(method: Callable[..., Fitted], classes: int) -> Any:
  """One after the other, not side by side: searches for neighbors branch."""
  if (method, classes) not in _PROGRAMS:

    def one(pair):
      settings, run = pair
      return method(run._replace(classes=classes), settings).curves

    over_runs = lambda settings, runs: jax.lax.map(
      lambda run: one((settings, run)), runs
    )
    _PROGRAMS[method, classes] = jax.jit(
      lambda grid, runs: jax.lax.map(lambda s: over_runs(s, runs), grid)
    )
  return _PROGRAMS[method, classes]
