"""A method: what is trained on noisy data, and how."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_ranger as ranger

Settings = dict[str, Any]


class Sizes(NamedTuple):
  """Numbers that are known when a program is compiled.

  Attributes:
    examples: the number of training examples.
    classes: the number of classes; 0 for regression.
  """

  examples: int
  classes: int


class View(NamedTuple):
  """What a method may see between two epochs.

  Attributes:
    epoch: how many epochs are done.
    epochs: how many there will be.
    key: a key of this epoch.
    x: the training features.
    labels: the training labels, or targets.
    features: gives what the last layer of the smoothed network sees of the training
      examples.
    logits: gives the outputs of the smoothed network for them.
    state: the state of the optimizer.
  """

  epoch: int
  epochs: int
  key: jax.Array
  x: jax.Array
  labels: jax.Array
  features: Callable[[], jax.Array]
  logits: Callable[[], jax.Array]
  state: Any


def usual_losses(logits, labels, ids, memory, settings):
  """Cross-entropy of classes, half the squared error of numbers."""
  del ids, settings
  return usual(logits, labels), memory


def usual(logits: jax.Array, labels: jax.Array) -> jax.Array:
  if jnp.issubdtype(labels.dtype, jnp.floating):
    return 0.5 * (logits[..., 0] - labels) ** 2
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def no_memory(x: jax.Array, labels: jax.Array, sizes: Sizes, settings: Settings) -> Any:
  del x, labels, sizes, settings
  return ()


def kept(view: View, memory: Any, settings: Settings) -> Any:
  del view, settings
  return memory


def nothing(memory: Any) -> dict[str, Any]:
  del memory
  return {}


def sgd(settings: Settings, sizes: Sizes) -> optax.GradientTransformation:
  """Nesterov SGD with weight decay and EMA, of the settings rate, decay and ema."""
  del sizes
  return optax.chain(
    optax.add_decayed_weights(settings["decay"]),
    optax.sgd(settings["rate"], momentum=0.9, nesterov=True),
    ranger.smooth_by_ema(settings["ema"]),
  )


class Method(NamedTuple):
  """A way to train on noisy data. Functions of one method are compiled once.

  Settings are numbers. Where a function is compiled they are traced, so they may
  differ from training to training. Besides those of the method they hold ``wrong`` and
  ``confusion``, the truth about the noise, for rivals that are told.

  Attributes:
    title: its name in the tables.
    losses: ``(logits [n, C], labels [n], ids [n], memory, settings)`` to the losses
      ``[n]`` and the memory; ``[2, n, C]`` and ``[2, n]`` with two networks. Compiled.
    settings: numbers.
    trials: settings to try; the best on noisy tuning examples is taken.
    memory: ``(x [n, d], labels [n], sizes, settings)`` to a pytree of arrays that
      `losses` and `between` may use and change.
    between: ``(view, memory, settings) -> memory``, before each epoch. Not compiled.
    optimizer: ``(settings, sizes)`` to an Optax transformation. Compiled.
    extra: extra args for the update of the optimizer, from the memory. Compiled.
    aggregate: ``settings`` to a step over per-example gradients; None for their mean.
    choose: ``(problem, fit, settings) -> bool [n]``, which examples are trained on,
      where a first training decides; see `_training.Fit`. It becomes the memory.
    networks: how many are trained at once.
    rival: whether it is one of the others.
  """

  title: str
  losses: Callable[..., tuple[jax.Array, Any]] = usual_losses
  settings: Settings = {}  # noqa: RUF012
  trials: tuple[Settings, ...] = ()
  memory: Callable[..., Any] = no_memory
  between: Callable[[View, Any, Settings], Any] = kept
  optimizer: Callable[[Settings, Sizes], Any] = sgd
  extra: Callable[[Any], dict[str, Any]] = nothing
  aggregate: Callable[[Settings], Any] | None = None
  choose: Callable[..., jax.Array] | None = None
  networks: int = 1
  rival: bool = True


def grid(**choices: tuple[float, ...]) -> tuple[Settings, ...]:
  """Every combination of the choices."""
  trials: list[Settings] = [{}]
  for name, values in choices.items():
    trials = [{**trial, name: value} for trial in trials for value in values]
  return tuple(trials)


def spelled(settings: Settings) -> str:
  return " ".join(f"{name}={value:g}" for name, value in settings.items())


def read(text: str) -> Settings:
  """The inverse of `spelled`."""
  pairs = (word.split("=") for word in text.split())
  return {name: float(value) for name, value in pairs}
