"""What people do against noise, and what Ranger has: each as a function of a run.

Each has three settings, nothing else is tuned.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.learning import _losses
from benchmarks.learning.other_noise import noise as noises
from benchmarks.learning.other_noise import training
import optax_ranger as ranger

_MOST_NEIGHBORS = 20
_LEAST = 1e-6

Settings = dict[str, float]


def cross_entropy(logits: jax.Array, y: jax.Array, smoothed: Any = None) -> jax.Array:
  del smoothed
  return _losses.cross_entropy(logits, y)


def squared(out: jax.Array, y: jax.Array, smoothed: Any = None) -> jax.Array:
  del smoothed
  return 0.5 * (out[:, 0] - y) ** 2


def _usual(run: training.Run) -> Callable[..., jax.Array]:
  return cross_entropy if run.classes else squared


def plain(run: training.Run, settings: Settings) -> training.Fitted:
  return training.fit(run, _usual(run), ema=None, rate=settings["rate"])


def averaged(run: training.Run, settings: Settings) -> training.Fitted:
  return training.fit(run, _usual(run), rate=settings["rate"])


def sce(run: training.Run, settings: Settings) -> training.Fitted:
  """Symmetric cross-entropy; the logarithm of 0 is -4."""
  alpha, beta = settings["alpha"], settings["beta"]
  return training.fit(
    run, lambda out, y, _: _losses.symmetric(out, y, alpha, beta, -4.0, _LEAST)
  )


def gce(run: training.Run, settings: Settings) -> training.Fitted:
  q = settings["q"]
  return training.fit(run, lambda out, y, _: _losses.generalized(out, y, q, _LEAST))


def elr(run: training.Run, settings: Settings) -> training.Fitted:
  return training.fit(run, _with_elr(settings["lambda"]))


def huber(run: training.Run, settings: Settings) -> training.Fitted:
  # Scaled so that small errors have the slope of the squared loss's.
  delta = settings["delta"]
  return training.fit(
    run, lambda out, y, _: optax.huber_loss(out[:, 0], y, delta=delta)
  )


def filtered(run: training.Run, settings: Settings) -> training.Fitted:
  """Drops the rows that most of their neighbors contradict, and trains.

  Of classes, neighbors in the logits of a first net trained for a quarter of the
  rounds (arXiv:2004.12289); of numbers, neighbors in the features, and a row is
  dropped whose target is many median deviations away from their median.
  """
  if run.classes:
    first = training.fit(run, cross_entropy, ids=run.ids[: len(run.ids) // 4])
    logits = training.outputs(first.mean, run.data.x)
    neighbors = _nearest(logits, settings["k"])
    kept = ranger.labels.label_support(neighbors, run.data.y) >= 0.5
  else:
    neighbors = ranger.neighbors.nearest(run.data.x, k=10)
    y = jnp.asarray(run.data.y)
    away = jnp.abs(y - jnp.median(y[neighbors.indices], axis=1))
    kept = away <= settings["deviations"] * jnp.median(away)
  weights = jnp.where(kept, 1.0, 0.0)
  return training.fit(run, _usual(run), weights=weights)


def neighbor_weights(run: training.Run, settings: Settings) -> training.Fitted:
  """Ranger's steps 1 and 4: rows that their neighbors back count more."""
  return training.fit(run, _usual(run), weights=_backed(run, settings))


def neighbor_weights_elr(run: training.Run, settings: Settings) -> training.Fitted:
  """The same, with ELR on top."""
  return training.fit(
    run, _with_elr(settings["lambda"]), weights=_backed(run, settings)
  )


def corrected(run: training.Run, settings: Settings) -> training.Fitted:
  """After a warm-up, which class is mistaken for which, told by neighbors."""
  early = max(1, len(run.ids) // 6)
  first = training.fit(run, cross_entropy, ids=run.ids[:early])
  neighbors = _nearest(
    training.features(first.mean, run.data.x), settings["k"], "cosine"
  )
  beliefs = ranger.smoothed_predictions(first.memory)
  beliefs = ranger.labels.neighbor_beliefs(neighbors, beliefs)
  confusion = ranger.labels.label_confusion(run.data.y, beliefs, sharpness=8.0)

  def losses(logits, y, smoothed):
    return ranger.labels.forward_corrected_loss(
      logits, y, confusion, exponent=settings["exponent"], smoothing=0.1
    )

  return training.fit(run, losses, ids=run.ids[early:], warm=first)


def _robust(
  make: Callable[[Settings], Any],
) -> Callable[[training.Run, Settings], training.Fitted]:
  def method(run, settings):
    rate = settings.get("rate", training.RATE)
    return training.fit(run, _usual(run), rate=rate, step=make(settings))

  return method


def _with_elr(factor: Any) -> Callable[..., jax.Array]:
  def losses(logits, y, smoothed):
    term = ranger.labels.early_learning_regularizer(logits, smoothed)
    return cross_entropy(logits, y) + factor * term

  return losses


def _nearest(rows: jax.Array, k: Any, metric: str = "euclidean") -> ranger.Neighbors:
  """Neighbors of which the first k have weight: one program whatever k is."""
  found = ranger.neighbors.nearest(rows, k=_MOST_NEIGHBORS, metric=metric)
  return _first(found, k)


def _first(neighbors: ranger.Neighbors, k: Any) -> ranger.Neighbors:
  used = jnp.arange(neighbors.weights.shape[1]) < k
  weights = jnp.where(used, neighbors.weights * (_MOST_NEIGHBORS / k), 0)
  return neighbors._replace(weights=weights)


def _backed(run: training.Run, settings: Settings) -> jax.Array:
  """Of classes, neighbors that agree; of numbers, neighbors in row and target.

  With a Gaussian kernel, a row far from all others has no weight.
  """
  x, y = jnp.asarray(run.data.x), jnp.asarray(run.data.y)
  if not run.classes:
    x = jnp.concatenate([x, settings["target_scale"] * y[:, None]], axis=1)
  found = ranger.neighbors.nearest(x, k=_MOST_NEIGHBORS)
  filled = jnp.where(found.indices >= 0, found.distances, jnp.nan)
  weigh = lambda kernel: (
    ranger.neighbors.weigh(
      found,
      kernel=kernel,
      bandwidth=jnp.nanmedian(filled),
      labels=run.data.y if run.classes else None,
    ).weights
  )
  gaussian = settings.get("gaussian", 1.0) > 0
  weights = jnp.where(gaussian, weigh("gaussian"), weigh("uniform"))
  neighbors = _first(found._replace(weights=weights), settings.get("k", 20.0))
  return ranger.example_weights(
    ranger.ranger_head(),
    len(x),
    neighbors=neighbors,
    member_weights=jnp.where(run.there, 1.0, 0.0),
  )


class Method(NamedTuple):
  """A way to train.

  Attributes:
    run: ``(run, settings) -> training.Fitted``, traceable in the settings.
    settings: what is tried.
    tasks: on which tasks.
    noises: on which kinds of noise; None for all.
    problems: on which problems; None for all.
  """

  run: Callable[[training.Run, Settings], training.Fitted]
  settings: tuple[Settings, ...]
  tasks: tuple[str, ...] = ("classes", "numbers")
  noises: tuple[str, ...] | None = None
  problems: tuple[str, ...] | None = None

  def suits(self, problem: str, noise: str) -> bool:
    return (
      noises.task(problem) in self.tasks
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


def run_all(method: Method, runs: list[training.Run]) -> tuple[np.ndarray, np.ndarray]:
  """Validation and test after every round, each ``[settings, runs, rounds]``."""
  arrays = [(run.data, run.ids, run.params) for run in runs]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
  grid = {
    name: jnp.asarray([one[name] for one in method.settings])
    for name in method.settings[0]
  }
  valid, test = _program(method.run, runs[0].classes)(grid, stacked)
  return np.asarray(valid), np.asarray(test)


_PROGRAMS: dict[Any, Any] = {}


def _program(method: Callable[..., training.Fitted], classes: int) -> Any:
  """One after the other, not side by side: searches for neighbors branch."""
  if (method, classes) not in _PROGRAMS:

    def one(pair):
      settings, (data, ids, params) = pair
      return method(training.Run(data, ids, params, classes), settings).curves

    over_runs = lambda settings, runs: jax.lax.map(
      lambda run: one((settings, run)), runs
    )
    _PROGRAMS[method, classes] = jax.jit(
      lambda grid, runs: jax.lax.map(lambda s: over_runs(s, runs), grid)
    )
  return _PROGRAMS[method, classes]
