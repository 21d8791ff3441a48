"""Ranger on wrong labels, `ranger.robust_labels`, and its ablations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.learning import _method
from benchmarks.learning._method import Method
from benchmarks.learning._method import Settings
from benchmarks.learning._method import Sizes
from benchmarks.learning._method import View
import optax_ranger as ranger

# The defaults of the library, beside the optimizer that rivals have too.
SETTINGS = {
  "rate": 0.05,
  "decay": 1e-3,
  "ema": 0.997,
  "exponent": 0.45,
  "smoothing": 0.2,
  "belief": 0.15,
  "sharpness": 2.0,
  "asks": 5.0,  # evenly over the epochs
}
_OF_RECIPE = ("exponent", "smoothing", "belief", "sharpness")


def recipe(settings: Settings, classes: int) -> ranger.recipes.RobustLabels:
  own = {name: settings[name] for name in _OF_RECIPE}
  return ranger.robust_labels(classes, **own)


def losses(logits, labels, ids, memory, settings):
  robust = recipe(settings, logits.shape[1])
  return robust.losses(memory, logits, labels, ids), memory


def memory(x: jax.Array, labels: jax.Array, sizes: Sizes, settings: Settings) -> Any:
  return recipe(settings, sizes.classes).init(x, labels)


def optimizer(settings: Settings, sizes: Sizes) -> optax.GradientTransformation:
  del sizes
  return optax.chain(
    optax.add_decayed_weights(settings["decay"]),
    optax.sgd(settings["rate"], momentum=0.9, nesterov=True),
    ranger.smooth_by_ema(settings["ema"], warmup=10),
  )


def ask(view: View, memory: Any, settings: Settings) -> Any:
  """Asks again in the learned features, evenly over the epochs."""
  parts = round(settings["asks"]) + 1
  whens = {round(i * view.epochs / parts) for i in range(1, parts)} - {0}
  return _asked(view, memory, settings) if view.epoch in whens else memory


def _asked(view: View, memory: Any, settings: Settings) -> Any:
  robust = recipe(settings, memory.beliefs.shape[1])
  return robust.ask(memory, view.features(), view.labels)


def uncorrected(logits, labels, ids, memory, settings):
  """The losses with the identity as the matrix, and all else as it is."""
  own = memory._replace(confusion=jnp.eye(logits.shape[1]))
  return losses(logits, labels, ids, own, settings)[0], memory


def informed(logits, labels, ids, memory, settings):
  """The losses with the true matrix."""
  own = memory._replace(confusion=jnp.asarray(settings["confusion"], jnp.float32))
  return losses(logits, labels, ids, own, settings)[0], memory


def accumulated(settings: Settings, sizes: Sizes) -> optax.GradientTransformation:
  return ranger.accumulate(optimizer(settings, sizes), every=2)


def with_ngs(settings: Settings, sizes: Sizes) -> optax.GradientTransformation:
  del sizes
  return optax.chain(
    optax.add_decayed_weights(settings["decay"]),
    ranger.scale_by_ngs(momentum=0.9),
    optax.scale_by_learning_rate(settings["rate"]),
    ranger.smooth_by_ema(settings["ema"], warmup=10),
  )


RANGER = Method(
  "Ranger, untuned",
  losses,
  SETTINGS,
  memory=memory,
  between=ask,
  optimizer=optimizer,
  rival=False,
)
TUNED = RANGER._replace(
  title="Ranger, tuned",
  trials=_method.grid(exponent=(0.15, 0.45), decay=(5e-4, 1e-3, 2e-3)),
)


def _changed(title: str, **settings: Any) -> Method:
  return RANGER._replace(title=title, settings={**SETTINGS, **settings})


_alone = functools.partial(
  Method, settings={**SETTINGS, "ema": 0.0, "decay": 0.0}, rival=False
)
ABLATIONS = {
  "no_ask": _changed("without asking again in the learned features", asks=0.0),
  "ask_once": _changed("asking once, after half of the epochs", asks=1.0),
  "no_weights": _changed("without weights of examples", sharpness=0.0),
  "no_correction": RANGER._replace(
    title="without correcting the loss", losses=uncorrected
  ),
  "true_confusion": RANGER._replace(title="given the true matrix", losses=informed),
  "no_beliefs": _changed("without the pull to the beliefs", belief=0.0),
  "no_exponent": _changed("without an exponent", exponent=0.0),
  "no_smoothing": _changed("without label smoothing", smoothing=0.0),
  "no_ema": _changed("without EMA", ema=0.0),
  "no_decay": _changed("without weight decay", decay=0.0),
  "ngs": RANGER._replace(title="with NGS instead of a fixed rate", optimizer=with_ngs),
  "accumulated": RANGER._replace(
    title="with two batches a step, at the same rate", optimizer=accumulated
  ),
  "alone_neighbors": _changed(
    "step 1 alone: beliefs, weights and correction; no EMA, no decay",
    ema=0.0,
    decay=0.0,
  ),
  "alone_accumulate": _alone(
    "step 2 alone: cross-entropy, two batches a step", optimizer=accumulated
  ),
  "alone_ngs": _alone("step 3 alone: cross-entropy, NGS", optimizer=with_ngs),
  "alone_ema": _alone(
    "step 5 alone: cross-entropy, EMA",
    settings={**SETTINGS, "decay": 0.0},
    optimizer=optimizer,
  ),
}
