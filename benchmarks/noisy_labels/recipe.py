"""Ranger on wrong labels: neighbors tell which labels get confused; and ablations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.noisy_labels import methods
import optax_ranger as ranger

_BLOCK = 2500
SETTINGS = {
  "rate": 0.08,
  "decay": 0.005,
  "ema": 0.99,
  "prediction_decay": 0.7,
  "warm_exponent": 0.7,
  "exponent": 0.1,
  "adaptive": 0.6,
  "smoothing": 0.05,
  "hyper_rate": 0.0,
  "warm_up": 5,
  "k": 10,
  "sharpness": 8.0,
}


def losses(logits, labels, ids, memory, settings):
  """Corrected by what neighbors tell, robust, and pulled to the uniform."""
  del ids
  corrected = ranger.forward_corrected_loss(
    logits,
    labels,
    memory["confusion"],
    exponent=memory["exponent"],
    smoothing=settings["smoothing"],
  )
  return corrected, memory


def memory(num_examples: int, settings: methods.Settings) -> Any:
  """Until neighbors have told, each label is of its own class."""
  del num_examples
  return {"confusion": jnp.eye(10), "exponent": settings["warm_exponent"]}


def optimizer(settings: methods.Settings, num_examples: int, every: int = 1):
  return ranger.ranger(
    settings["rate"],
    acceleration=1.0,
    hyper_rate=settings["hyper_rate"],
    bounds=(0.25, 4.0),
    weight_decay=settings["decay"],
    every=every,
    ema_decay=settings["ema"],
    num_examples=num_examples,
    num_classes=10,
    prediction_decay=settings["prediction_decay"],
  )


def estimate(view: methods.View, settings: methods.Settings, own: bool = False) -> Any:
  """The confusion matrix that neighbors in the network's own space tell."""
  n = len(view.labels)
  ids = jnp.arange(n)
  predictions = ranger.smoothed_predictions(view.state, ids)
  if own:
    return ranger.label_confusion(
      view.labels, predictions, sharpness=settings["sharpness"]
    )
  # In blocks drawn at random: a quarter of the neighbors at a quarter of the time.
  size = min(_BLOCK, n)
  order = jax.random.permutation(view.key, n)[: n // size * size].reshape(-1, size)
  features = view.features(view.images)
  k = int(settings["k"])
  beliefs = jnp.concatenate(
    [_beliefs(features[block], predictions[block], k) for block in order]
  )
  return ranger.label_confusion(
    view.labels[order.reshape(-1)], beliefs, sharpness=settings["sharpness"]
  )


def _neighbors_beliefs(features: jax.Array, predictions: jax.Array, k: int):
  neighbors = ranger.nearest_neighbors(features, k, metric="cosine")
  return ranger.neighbor_beliefs(neighbors, predictions)


_beliefs = jax.jit(_neighbors_beliefs, static_argnums=2)


def between(
  view: methods.View, memory: Any, settings: methods.Settings, own: bool = False
) -> Any:
  if view.epoch != settings["warm_up"]:
    return memory
  return _corrected(estimate(view, settings, own), settings)


def _corrected(confusion: jax.Array, settings: methods.Settings) -> Any:
  """The more labels are wrong, the sooner a contradicting one is let go."""
  wrong = 1 - jnp.trace(confusion) / len(confusion)
  exponent = settings["exponent"] + settings["adaptive"] * wrong
  return {"confusion": confusion, "exponent": exponent}


def _told(view: methods.View, memory: Any, settings: methods.Settings) -> Any:
  """The true matrix, which nobody has."""
  if view.epoch != settings["warm_up"]:
    return memory
  return _corrected(jnp.asarray(settings["confusion"], jnp.float32), settings)


RANGER = methods.Method(
  "Ranger",
  losses,
  SETTINGS,
  methods.grid(warm_exponent=(0.3, 0.5, 0.7), exponent=(0.1,), adaptive=(0.6, 0.8)),
  memory=memory,
  between=between,
  optimizer=optimizer,
)


def _changed(title: str, **settings: Any) -> methods.Method:
  return RANGER._replace(title=title, settings={**SETTINGS, **settings}, trials=())


ABLATIONS = {
  "no_confusion": RANGER._replace(
    title="without the confusion matrix", between=methods.kept
  ),
  "own_confusion": RANGER._replace(
    title="its own predictions instead of its neighbors'",
    between=functools.partial(between, own=True),
  ),
  "true_confusion": RANGER._replace(
    title="told the true confusion matrix", between=_told
  ),
  "no_exponent": _changed(
    "without exponents", warm_exponent=0.0, exponent=0.0, adaptive=0.0
  ),
  "no_smoothing": _changed("without label smoothing", smoothing=0.0),
  "no_ema": _changed("without EMA", ema=0.0),
  "ngs": _changed("with NGS instead of a fixed rate", hyper_rate=0.01),
  "accumulated": RANGER._replace(
    title="with two batches a step, at the same rate",
    optimizer=lambda settings, n: optimizer(settings, n, every=2),
  ),
}
