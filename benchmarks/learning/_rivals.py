"""The rivals, as plainly as their papers have them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from benchmarks.learning import _confident
from benchmarks.learning._method import Method
from benchmarks.learning._method import Settings
from benchmarks.learning._method import Sizes
from benchmarks.learning._method import View
from benchmarks.learning._method import grid
from benchmarks.learning._method import usual
import optax_ranger as ranger

_FOLDS = 5


def smoothed_labels(logits, labels, ids, memory, settings):
  del ids
  targets = jax.nn.one_hot(labels, logits.shape[-1])
  targets = optax.smooth_labels(targets, settings["smoothing"])
  return optax.softmax_cross_entropy(logits, targets), memory


def generalized(logits, labels, ids, memory, settings):
  """GCE, Zhang and Sabuncu, 2018, https://arxiv.org/abs/1805.07836."""
  del ids
  chance = jnp.maximum(_chance(logits, labels), 1e-7)
  return (1 - chance ** settings["exponent"]) / settings["exponent"], memory


def symmetric(logits, labels, ids, memory, settings):
  """SCE, Wang et al., 2019, https://arxiv.org/abs/1908.06112."""
  del ids
  backward = -settings["log_of_zero"] * (1 - _chance(logits, labels))
  forward = usual(logits, labels)
  return settings["forward"] * forward + settings["reverse"] * backward, memory


def _chance(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=1)[:, 0]


def early_learning(logits, labels, ids, memory, settings):
  """ELR, Liu et al., 2020, https://arxiv.org/abs/2007.00151."""
  probabilities = jax.nn.softmax(logits)
  clipped = jnp.clip(jax.lax.stop_gradient(probabilities), 1e-4, 1 - 1e-4)
  clipped /= clipped.sum(axis=1, keepdims=True)
  beta = settings["prediction_decay"]
  targets = beta * memory[ids] + (1 - beta) * clipped
  agreement = (probabilities * targets).sum(axis=1)
  regularizer = jnp.log(jnp.maximum(1 - agreement, 1e-4))
  losses = usual(logits, labels) + settings["strength"] * regularizer
  return losses, memory.at[ids].set(targets)


def table(x: jax.Array, labels: jax.Array, sizes: Sizes, settings: Settings) -> Any:
  del x, labels, settings
  return jnp.zeros([sizes.examples, sizes.classes])


def co_teaching(logits, labels, ids, memory, settings):
  """Co-teaching, Han et al., 2018, https://arxiv.org/abs/1804.06872.

  Each network learns the examples that are easy for the other.
  """
  del ids, settings
  both = jnp.broadcast_to(labels, logits.shape[:2])
  losses = usual(logits, both)
  rank = jnp.argsort(jnp.argsort(jax.lax.stop_gradient(losses), axis=1), axis=1)
  count = losses.shape[1]
  kept = jnp.round((1 - memory) * count)
  chosen = (rank < kept)[::-1]
  return jnp.where(chosen, losses, 0) * count / kept, memory


def forget(view: View, memory: Any, settings: Settings) -> Any:
  """The share that is left out grows over the first epochs to that of wrong labels."""
  del memory
  ramp = (view.epoch + 1) / settings["ramp"]
  return jnp.float32(settings["wrong"] * min(ramp, 1.0))


def chosen_losses(logits, labels, ids, memory, settings):
  """Of the examples that the memory holds only; of weight one in the mean."""
  del settings
  chosen = memory[ids]
  losses = jnp.where(chosen, usual(logits, labels), 0)
  return losses / jnp.maximum(chosen.mean(), 1e-3), memory


def choose_by_neighbors(problem, fit, settings):
  """Deep k-NN, Bahri et al., 2020, https://arxiv.org/abs/2004.12289.

  Keeps the labels that most neighbors have, in the space of the logits of a first
  network.
  """
  logits = fit(problem, epochs=settings.get("first", 1.0))(problem.train.x)
  neighbors = ranger.neighbors.nearest(logits, int(settings["k"]))
  votes = jax.nn.one_hot(problem.train.y[neighbors.indices], problem.classes).sum(
    axis=1
  )
  return votes.argmax(axis=1) == problem.train.y


def choose_by_confidence(problem, fit, settings):
  """Keeps the labels that cleanlab would, by five folds, a third of the epochs each."""
  n, (x, y) = len(problem.train.y), problem.train
  order = np.random.default_rng(fit.seed).permutation(n)
  chances = np.zeros([n, problem.classes])
  for fold in np.array_split(order, _FOLDS):
    rest = np.setdiff1d(order, fold)
    train = problem.train._replace(x=x[rest], y=y[rest])
    part = problem._replace(
      train=train, true=problem.true[rest], steps=max(1, len(rest) // problem.batch)
    )
    model = "linear" if settings["linear"] else ""
    logits = fit(part, model=model, epochs=1 / 3)(x[fold])
    chances[fold] = jax.nn.softmax(logits)
  return jnp.asarray(~_confident.prune_by_noise_rate(np.asarray(y), chances))


def floored(logits, labels, ids, memory, settings):
  """The forward-corrected loss with a floor, both of the share of wrong labels alone.

  Toner and Storkey, 2023, https://arxiv.org/abs/2307.13100: where classes are
  separable, no classifier has a smaller risk on noisy labels than their mean entropy
  given the class, so a smaller training loss is memorizing. Of the share of wrong
  labels alone, that entropy is known up to how wrong labels spread: on one class
  (``spread`` 0, the least) or on all (1, the most). Below the floor the loss is
  climbed.
  """
  del ids
  classes, wrong = logits.shape[-1], settings["wrong"]
  same = jnp.eye(classes)
  confusion = (1 - wrong) * same + wrong / (classes - 1) * (1 - same)
  losses = ranger.labels.forward_corrected_loss(logits, labels, confusion)
  entropy = jax.scipy.special.entr(wrong) + jax.scipy.special.entr(1 - wrong)
  floor = entropy + settings["spread"] * wrong * jnp.log(classes - 1)
  above = jax.lax.stop_gradient(losses.mean()) - floor
  return jnp.where(above < 0, 2 * floor - losses, losses), memory


def count_events(logits, labels, ids, memory, settings):
  """IDO, Zhang et al., 2025, https://arxiv.org/abs/2505.00812.

  A wrong event: an example is visited and its label is not the likeliest class. At
  first the loss is cross-entropy; then it is weighed by the chance of a label to be
  right, given its events, and the rest of the weight pulls to a small entropy. The
  term for two augmented views is left out: there is no augmentation for anybody.
  """
  del settings
  probabilities = jnp.clip(jax.nn.softmax(logits), 1e-4, 1 - 1e-4)
  entropy = -(probabilities * jnp.log(probabilities)).sum(axis=1)
  guess = logits.argmax(axis=1).astype(jnp.int32)
  events = memory["events"].at[ids].add(jnp.where(guess != labels, 1.0, 0.0))
  # Counts beyond the largest one that the mixture has seen are as bad as that.
  place = jnp.clip(events[ids], 0, len(memory["right"]) - 1).astype(jnp.int32)
  right = memory["right"][place]
  losses = right * usual(logits, labels) + (1 - right) * entropy
  after = {**memory, "events": events, "guess": memory["guess"].at[ids].set(guess)}
  return losses, after


def no_events(x: jax.Array, labels: jax.Array, sizes: Sizes, settings: Settings) -> Any:
  del x, labels, settings
  return {
    "events": jnp.zeros(sizes.examples),
    "guess": jnp.full([sizes.examples], -1, jnp.int32),
    "before": jnp.full([sizes.examples], -1, jnp.int32),
    "changes": jnp.float32(jnp.inf),
    "robust": jnp.array(False),
    # By the number of events: the chance that the label is right.
    "right": jnp.ones(256),
    "mixture": jnp.array([[1.0, 2.0, 0.5], [2.0, 1.0, 0.5]]),
  }


def weigh_events(view: View, memory: Any, settings: Settings) -> Any:
  """Ends the first stage when predictions stop settling, and fits the mixture.

  The end is that of "label wave": the first epoch after which more predictions have
  changed than in the epoch before; a third of the epochs at the latest.
  """
  del settings
  if not view.epoch:
    return memory
  robust = bool(memory["robust"])
  if not robust:
    changes = jnp.sum(memory["guess"] != memory["before"]).astype(jnp.float32)
    done = view.epoch > 1 and (changes >= memory["changes"])
    robust = bool(done) or 3 * view.epoch >= view.epochs
    memory = {**memory, "before": memory["guess"], "changes": changes}
    if not robust:
      return memory
    rounds = 20
  else:
    rounds = 1
  events = np.asarray(memory["events"], float)
  mixture, right = fit_mixture(
    events, np.asarray(memory["mixture"], float), rounds, len(memory["right"])
  )
  return {
    **memory,
    "robust": jnp.array(True),
    "mixture": jnp.asarray(mixture, jnp.float32),
    "right": jnp.asarray(right, jnp.float32),
  }


def fit_mixture(
  events: np.ndarray, mixture: np.ndarray, rounds: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Two beta distributions of the counts, by expectation and moments.

  Args:
    events: ``[n]``, counts.
    mixture: ``[2, 3]``, alpha, beta and weight; the first is that of few events.
    rounds: of the fit.
    size: of the table.

  Returns:
    The mixture, and the chance of the first by the count, ``[size]``.
  """
  least, most = events.min(), max(events.max(), events.min() + 1)
  scaled = lambda count: ((count - least) / (most - least)).clip(1e-6, 1 - 1e-6)
  density = lambda at: np.stack(
    [weight * stats.beta.pdf(at, a, b) for a, b, weight in mixture]
  ).clip(1e-6)
  x = scaled(events)
  for _ in range(rounds):
    share = density(x)
    share /= share.sum(axis=0)
    for k, part in enumerate(share):
      mean = np.average(x, weights=part)
      variance = max(np.average((x - mean) ** 2, weights=part), 1e-6)
      alpha = max(mean * (mean * (1 - mean) / variance - 1), 1e-6)
      beta = max(alpha * (1 - mean) / mean, 1e-6)
      # The first never rises towards many events, nor the second towards few.
      alpha, beta = (max(alpha, 1.1) if k else alpha), (beta if k else max(beta, 1.1))
      mixture[k] = alpha, beta, part.mean()
  both = density(scaled(np.arange(size)))
  return mixture, both[0] / both.sum(axis=0)


_SGD = {"rate": 0.05, "decay": 1e-3, "ema": 0.99}
RIVALS = {
  "cross_entropy": Method(
    "cross-entropy", settings={"rate": 0.05, "decay": 0.0, "ema": 0.0}
  ),
  "averaged": Method(
    "cross-entropy, weight decay, EMA",
    settings={**_SGD, "decay": 2e-3},
    trials=grid(rate=(0.02, 0.05), decay=(2e-3, 5e-3, 1.5e-2)),
  ),
  "label_smoothing": Method(
    "label smoothing",
    smoothed_labels,
    {**_SGD, "decay": 2e-3, "smoothing": 0.1},
    grid(smoothing=(0.1, 0.4), decay=(5e-4, 2e-3, 1e-2)),
  ),
  "gce": Method(
    "GCE",
    generalized,
    {**_SGD, "decay": 5e-4, "exponent": 0.5},
    grid(exponent=(0.5, 0.7), decay=(5e-4, 2e-3, 1e-2)),
  ),
  "sce": Method(
    "SCE",
    symmetric,
    # log(1e-4), where the authors' code clips the labels.
    {**_SGD, "rate": 0.03, "forward": 0.3, "reverse": 1.0, "log_of_zero": -9.21},
    grid(forward=(0.1, 0.3), decay=(5e-4, 2e-3, 1e-2)),
  ),
  "elr": Method(
    "ELR",
    early_learning,
    {**_SGD, "decay": 5e-4, "strength": 1.0, "prediction_decay": 0.7},
    grid(strength=(1.0, 3.0), decay=(5e-4, 2e-3, 1e-2)),
    memory=table,
  ),
  "co_teaching": Method(
    "co-teaching (two networks, told the share of wrong labels)",
    co_teaching,
    {**_SGD, "decay": 0.0, "ramp": 5.0},
    grid(ramp=(5.0, 10.0), decay=(0.0, 2e-3, 1e-2)),
    memory=lambda x, labels, sizes, settings: jnp.float32(0),
    between=forget,
    networks=2,
  ),
  "floor": Method(
    "forward correction with a floor (told the share of wrong labels)",
    floored,
    {**_SGD, "decay": 2e-3, "spread": 1.0},
    grid(spread=(0.0, 1.0), decay=(5e-4, 2e-3, 1e-2)),
  ),
  "ido": Method(
    "IDO",
    count_events,
    {**_SGD, "decay": 2e-3},
    grid(rate=(0.02, 0.05), decay=(5e-4, 2e-3, 1e-2)),
    memory=no_events,
    between=weigh_events,
  ),
  "deep_knn": Method(
    "deep k-NN filter, then cross-entropy (two trainings)",
    chosen_losses,
    {**_SGD, "decay": 2e-3, "k": 50},
    grid(k=(20, 50), decay=(1e-3, 4e-3, 1.5e-2)),
    choose=choose_by_neighbors,
  ),
  "cleanlab": Method(
    "cleanlab's filter, then cross-entropy (five folds)",
    chosen_losses,
    {**_SGD, "decay": 2e-3, "linear": 0.0},
    grid(linear=(0.0, 1.0), decay=(1e-3, 4e-3, 1.5e-2)),
    choose=choose_by_confidence,
  ),
}
