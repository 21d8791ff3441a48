"""Ranger on wrong labels: neighbors estimate which labels get confused; ablations."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.learning import _method
from benchmarks.learning._method import Method
from benchmarks.learning._method import Settings
from benchmarks.learning._method import Sizes
from benchmarks.learning._method import View
import optax_ranger as ranger

_BLOCK = 2500
SETTINGS = {
  "rate": 0.12,
  "decay": 0.003,
  "ema": 0.997,
  "prediction_decay": 0.7,
  "warm_exponent": 0.5,
  "exponent": 0.4,
  "smoothing": 0.05,
  "hyper_rate": 0.0,
  "warm_up": 5,
  "again": 15,
  "k": 10,
  "sharpness": 8.0,
}


def losses(logits, labels, ids, memory, settings):
  """Corrected by what neighbors reveal, robust, and pulled to the uniform."""
  corrected = ranger.labels.forward_corrected_loss(
    logits,
    labels,
    memory["confusion"],
    exponent=memory["exponent"],
    smoothing=settings["smoothing"],
  )
  return memory["weights"][ids] * corrected, memory


def memory(x: jax.Array, labels: jax.Array, sizes: Sizes, settings: Settings) -> Any:
  """Until neighbors have been asked, each label is of its own class."""
  del x, labels
  return {
    "confusion": jnp.eye(sizes.classes),
    "exponent": jnp.float32(settings["warm_exponent"]),
    "weights": jnp.ones(sizes.examples),
  }


def optimizer(settings: Settings, sizes: Sizes, every: int = 1):
  return ranger.ranger(
    settings["rate"],
    acceleration=1.0,
    hyper_rate=settings["hyper_rate"],
    bounds=(0.25, 4.0),
    weight_decay=settings["decay"],
    every=every,
    ema_decay=settings["ema"],
    ema_warmup=0,  # as the committed figures were made
    num_examples=sizes.examples,
    num_classes=sizes.classes,
    prediction_decay=settings["prediction_decay"],
  )


def neighbors_believe(view: View, settings: Settings) -> tuple[jax.Array, jax.Array]:
  """Beliefs of the neighbors in the network's own space, and their examples."""
  n = len(view.labels)
  predictions = ranger.smoothed_predictions(view.state, jnp.arange(n))
  # In blocks drawn at random: a quarter of the neighbors at a quarter of the time.
  size = min(_BLOCK, n)
  order = jax.random.permutation(view.key, n)[: n // size * size].reshape(-1, size)
  features, k = view.features(), int(settings["k"])
  beliefs = [_block(features[ids], predictions[ids], k) for ids in order]
  return jnp.concatenate(beliefs), order.reshape(-1)


@functools.partial(jax.jit, static_argnums=2)
def _block(features: jax.Array, predictions: jax.Array, k: int) -> jax.Array:
  neighbors = ranger.neighbors.nearest(features, k, metric="cosine")
  return ranger.labels.neighbor_beliefs(neighbors, predictions)


def own_beliefs(view: View, settings: Settings) -> tuple[jax.Array, jax.Array]:
  del settings
  ids = jnp.arange(len(view.labels))
  return ranger.smoothed_predictions(view.state, ids), ids


def between(
  view: View,
  memory: Any,
  settings: Settings,
  *,
  beliefs_of: Callable[..., tuple[jax.Array, jax.Array]] = neighbors_believe,
  told: bool = False,
  weighted: bool = True,
  even: bool = False,
  corrected: bool = True,
) -> Any:
  """Estimates the confusion matrix, and how well each label is supported.

  Args:
    view: what a method may see.
    memory: its arrays.
    settings: its numbers.
    beliefs_of: gives beliefs, and their examples.
    told: whether the true matrix is given away.
    weighted: whether neighbors weigh examples too.
    even: whether wrong labels are taken to fall evenly on all classes.
    corrected: whether the loss is corrected.
  """
  if view.epoch not in (settings["warm_up"], settings["again"]):
    return memory
  beliefs, ids = beliefs_of(view, settings)
  confusion = ranger.labels.label_confusion(
    view.labels[ids], beliefs, sharpness=settings["sharpness"]
  )
  if told:
    confusion = jnp.asarray(settings["confusion"], jnp.float32)
  spread = jnp.float32(1) if even else ranger.labels.confusion_spread(confusion)
  weights = memory["weights"]
  if weighted:
    weights = supported(view.labels, ids, beliefs, confusion, spread)
  return {
    "confusion": confusion if corrected else memory["confusion"],
    "exponent": jnp.float32(settings["exponent"]) * spread,
    "weights": weights,
  }


@jax.jit
def supported(labels, ids, beliefs, confusion, spread):
  """The chance of each label to be right, as far as noise falls evenly; mean one."""
  given = labels[ids]
  targets = ranger.labels.refine_targets(given, beliefs, confusion=confusion)
  right = jnp.take_along_axis(targets, given[:, None], axis=1)[:, 0] ** spread
  return jnp.ones(len(labels)).at[ids].set(right / jnp.maximum(right.mean(), 1e-3))


RANGER = Method(
  "Ranger",
  losses,
  SETTINGS,
  memory=memory,
  between=between,
  optimizer=optimizer,
  rival=False,
)
TUNED = RANGER._replace(
  title="Ranger, tuned",
  trials=_method.grid(exponent=(0.4, 0.8), decay=(1e-3, 3e-3, 1e-2)),
)


def _changed(title: str, **settings: Any) -> Method:
  return RANGER._replace(title=title, settings={**SETTINGS, **settings})


def _without(title: str, **changes: Any) -> Method:
  return RANGER._replace(title=title, between=functools.partial(between, **changes))


ABLATIONS = {
  "no_confusion": RANGER._replace(
    title="without what neighbors tell (exponent 0.5 throughout)", between=_method.kept
  ),
  "own_confusion": _without(
    "its own predictions instead of its neighbors'", beliefs_of=own_beliefs
  ),
  "true_confusion": _without("told the true confusion matrix", told=True),
  "no_correction": _without("without correcting the loss", corrected=False),
  "no_weights": _without("without weights of examples", weighted=False),
  "even": _without("as if wrong labels fell evenly on all classes", even=True),
  "one_search": _changed("with one search", again=-1),
  "no_exponent": _changed("without exponents", warm_exponent=0.0, exponent=0.0),
  "no_smoothing": _changed("without label smoothing", smoothing=0.0),
  "no_ema": _changed("without EMA", ema=0.0),
  "ngs": _changed("with NGS instead of a fixed rate", hyper_rate=0.01),
  "accumulated": RANGER._replace(
    title="with two batches a step, at the same rate",
    optimizer=functools.partial(optimizer, every=2),
  ),
}
