"""The rivals, as plainly as their papers have them, and what Ranger does instead."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.learning import _losses
import optax_ranger as ranger

_LOG_OF_ZERO = -9.21  # log(1e-4): where the authors' code clips the labels.
_SGD = {"rate": 0.05, "decay": 1e-3, "ema": 0.99}
Settings = dict[str, Any]


class View(NamedTuple):
  """What a method may see between two epochs."""

  epoch: int
  key: jax.Array
  images: jax.Array
  labels: jax.Array
  features: Callable[[jax.Array], jax.Array]
  state: Any


def kept(view: View, memory: Any, settings: Settings) -> Any:
  del view, settings
  return memory


def _sgd(settings: Settings, num_examples: int) -> optax.GradientTransformation:
  del num_examples
  return optax.chain(
    optax.add_decayed_weights(settings["decay"]),
    optax.sgd(settings["rate"], momentum=0.9, nesterov=True),
    ranger.smooth_by_ema(settings["ema"]),
  )


class Method(NamedTuple):
  """A way to train on labels of which some are wrong.

  Attributes:
    title: its name in the table.
    losses: logits ``[n, C]``, labels ``[n]``, ids ``[n]``, memory and settings to
      the losses ``[n]`` and the memory; ``[2, n, C]`` with two networks.
    settings: numbers, which may be traced.
    trials: settings to try instead; the best over all kinds of noise, on noisy
      tuning images, are those above.
    memory: what is remembered of each example at the start.
    between: what happens between two epochs.
    optimizer: by settings and number of examples.
    networks: trained at once.
    filtered: whether a first training chooses the examples of a second one.
  """

  title: str
  losses: Callable[..., tuple[jax.Array, Any]]
  settings: Settings
  trials: tuple[Settings, ...] = ()
  memory: Callable[[int, Settings], Any] = lambda num_examples, settings: ()
  between: Callable[[View, Any, Settings], Any] = kept
  optimizer: Callable[..., optax.GradientTransformation] = _sgd
  networks: int = 1
  filtered: bool = False


def _cross_entropy(logits, labels, ids, memory, settings):
  del ids, settings
  return _losses.cross_entropy(logits, labels), memory


def _smoothed_labels(logits, labels, ids, memory, settings):
  del ids
  targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), settings["smoothing"])
  return optax.softmax_cross_entropy(logits, targets), memory


def _generalized(logits, labels, ids, memory, settings):
  del ids
  return _losses.generalized(logits, labels, settings["exponent"]), memory


def _symmetric(logits, labels, ids, memory, settings):
  del ids
  forward, reverse = settings["forward"], settings["reverse"]
  losses = _losses.symmetric(logits, labels, forward, reverse, _LOG_OF_ZERO)
  return losses, memory


def _early_learning(logits, labels, ids, memory, settings):
  """ELR, Liu et al., 2020, arXiv:2007.00151."""
  probabilities = jax.nn.softmax(logits)
  clipped = jnp.clip(jax.lax.stop_gradient(probabilities), 1e-4, 1 - 1e-4)
  clipped /= clipped.sum(axis=1, keepdims=True)
  beta = settings["prediction_decay"]
  targets = beta * memory[ids] + (1 - beta) * clipped
  losses, _ = _cross_entropy(logits, labels, ids, (), settings)
  agreement = (probabilities * targets).sum(axis=1)
  losses += settings["strength"] * jnp.log(jnp.maximum(1 - agreement, 1e-4))
  return losses, memory.at[ids].set(targets)


def _table(num_examples: int, settings: Settings) -> jax.Array:
  del settings
  return jnp.zeros([num_examples, 10])


def _co_teaching(logits, labels, ids, memory, settings):
  """Co-teaching, Han et al., 2018: each learns what the other finds easy."""
  del ids, settings
  both = jnp.broadcast_to(labels, logits.shape[:2])
  losses = _losses.cross_entropy(logits, both)
  rank = jnp.argsort(jnp.argsort(jax.lax.stop_gradient(losses), axis=1), axis=1)
  count = losses.shape[1]
  kept = jnp.round((1 - memory) * count)
  chosen = (rank < kept)[::-1]
  return jnp.where(chosen, losses, 0) * count / kept, memory


def _forget(view: View, memory: Any, settings: Settings) -> Any:
  """The share that is left out grows over the first epochs to that of wrong labels."""
  del memory
  ramp = (view.epoch + 1) / settings["ramp"]
  return jnp.float32(settings["wrong"] * min(ramp, 1.0))


def _chosen(logits, labels, ids, memory, settings):
  losses, _ = _cross_entropy(logits, labels, ids, (), settings)
  chosen = memory[ids]
  return jnp.where(chosen, losses, 0) / jnp.maximum(chosen.mean(), 1e-3), memory


def _everything(num_examples: int, settings: Settings) -> jax.Array:
  del settings
  return jnp.ones([num_examples], bool)


def grid(**choices: tuple[float, ...]) -> tuple[Settings, ...]:
  """Every combination of the choices."""
  trials: list[Settings] = [{}]
  for name, values in choices.items():
    trials = [{**trial, name: value} for trial in trials for value in values]
  return tuple(trials)


RIVALS = {
  "cross_entropy": Method(
    "cross-entropy", _cross_entropy, {"rate": 0.05, "decay": 0.0, "ema": 0.0}
  ),
  "averaged": Method(
    "cross-entropy, weight decay, EMA",
    _cross_entropy,
    {**_SGD, "decay": 2e-3},
    grid(rate=(0.02, 0.05), decay=(1e-3, 2e-3, 4e-3)),
  ),
  "label_smoothing": Method(
    "label smoothing",
    _smoothed_labels,
    {**_SGD, "decay": 2e-3, "smoothing": 0.1},
    grid(smoothing=(0.1, 0.3, 0.5), decay=(5e-4, 2e-3)),
  ),
  "gce": Method(
    "GCE",
    _generalized,
    {**_SGD, "decay": 5e-4, "exponent": 0.5},
    grid(exponent=(0.5, 0.7), decay=(0.0, 5e-4, 1e-3)),
  ),
  "sce": Method(
    "SCE",
    _symmetric,
    {**_SGD, "rate": 0.03, "forward": 0.3, "reverse": 1.0},
    grid(forward=(0.1, 0.3), decay=(0.0, 5e-4, 1e-3, 2e-3)),
  ),
  "elr": Method(
    "ELR",
    _early_learning,
    {**_SGD, "decay": 5e-4, "strength": 1.0, "prediction_decay": 0.7},
    grid(strength=(1.0, 3.0), decay=(0.0, 5e-4, 2e-3)),
    memory=_table,
  ),
  "co_teaching": Method(
    "co-teaching (two networks, told the share of wrong labels)",
    _co_teaching,
    {**_SGD, "decay": 0.0, "ramp": 5.0},
    grid(ramp=(5.0, 10.0), decay=(0.0, 1e-3, 2e-3)),
    memory=lambda num_examples, settings: jnp.float32(0),
    between=_forget,
    networks=2,
  ),
  "deep_knn": Method(
    "deep k-NN filter, then cross-entropy (two trainings)",
    _chosen,
    {**_SGD, "decay": 2e-3, "k": 50},
    grid(k=(20, 50), decay=(5e-4, 1e-3, 2e-3, 4e-3)),
    memory=_everything,
    filtered=True,
  ),
}
