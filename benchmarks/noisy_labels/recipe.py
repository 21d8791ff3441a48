"""Ranger on wrong labels: neighbors tell which labels get confused; and ablations."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.noisy_labels import methods
import optax_ranger as ranger

_BLOCK = 2500
SETTINGS = {
  "rate": 0.08,
  "decay": 0.01,
  "ema": 0.99,
  "prediction_decay": 0.7,
  "exponent": 0.3,
  "smoothing": 0.05,
  "hyper_rate": 0.0,
  "warm_up": 5,
  "k": 10,
  "sharpness": 8.0,
}


def losses(logits, labels, ids, memory, settings):
  """Cross-entropy first; then it is corrected, robust and pulled to uniform."""
  del ids
  plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  corrected = ranger.forward_corrected_loss(
    logits,
    labels,
    memory["confusion"],
    exponent=settings["exponent"],
    smoothing=settings["smoothing"],
  )
  return jnp.where(memory["warm"], plain, corrected), memory


def memory(num_examples: int, settings: methods.Settings) -> Any:
  del num_examples, settings
  return {"warm": jnp.bool_(True), "confusion": jnp.eye(10)}


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


def between(view: methods.View, memory: Any, settings: methods.Settings) -> Any:
  if view.epoch != settings["warm_up"]:
    return memory
  return {"warm": jnp.bool_(False), "confusion": estimate(view, settings)}


def _own(view: methods.View, memory: Any, settings: methods.Settings) -> Any:
  if view.epoch != settings["warm_up"]:
    return memory
  return {"warm": jnp.bool_(False), "confusion": estimate(view, settings, own=True)}


def _without(view: methods.View, memory: Any, settings: methods.Settings) -> Any:
  """Nothing is estimated: each label is of its own class."""
  warm = jnp.bool_(view.epoch < settings["warm_up"])
  return {**memory, "warm": warm}


def _told(view: methods.View, memory: Any, settings: methods.Settings) -> Any:
  """The true matrix, which nobody has."""
  warm = jnp.bool_(view.epoch < settings["warm_up"])
  return {"warm": warm, "confusion": settings["confusion"]}


RANGER = methods.Method(
  "Ranger",
  losses,
  SETTINGS,
  methods._grid(exponent=(0.3, 0.4), smoothing=(0.05, 0.1, 0.2)),
  memory=memory,
  between=between,
  optimizer=optimizer,
)


def _changed(title: str, **settings: Any) -> methods.Method:
  return RANGER._replace(title=title, settings={**SETTINGS, **settings}, trials=())


ABLATIONS = {
  "no_confusion": RANGER._replace(
    title="without the confusion matrix", between=_without
  ),
  "own_confusion": RANGER._replace(
    title="its own predictions instead of its neighbors'", between=_own
  ),
  "true_confusion": RANGER._replace(
    title="told the true confusion matrix", between=_told
  ),
  "no_exponent": _changed("without the exponent", exponent=0.0),
  "no_smoothing": _changed("without label smoothing", smoothing=0.0),
  "no_ema": _changed("without EMA", ema=0.0),
  "ngs": _changed("with NGS instead of a fixed rate", hyper_rate=0.01),
  "accumulated": RANGER._replace(
    title="with two batches a step, at the same rate",
    optimizer=lambda settings, n: optimizer(settings, n, every=2),
  ),
}
