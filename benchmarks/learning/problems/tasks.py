"""Small tasks of optimization: a loss by the parameters and the inputs of a step."""

from collections.abc import Callable
import pathlib
from pydoc_data import topics
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import model_selection

from benchmarks.learning.problems import images


class Task(NamedTuple):
  """All it takes to train, from any seed.

  Attributes:
    setup: the parameters and the inputs of all steps, by the seed.
    loss: the loss of parameters on the inputs of one step.
    train_loss: the loss that is compared.
    test: the figure on data that is held out, or None.
    figure: what `test` is called.
  """

  setup: Callable[[int], tuple[Any, Any]]
  loss: Callable[[Any, Any], jax.Array]
  train_loss: Callable[[Any], jax.Array]
  test: Callable[[Any], jax.Array] | None
  figure: str


def digits(quick: bool, folder: pathlib.Path | None = None) -> Task:
  """Scikit-learn's digits, MLP 64-128-10, batch 64, 20 epochs."""
  source = images.digits(folder)
  parts = model_selection.train_test_split(
    source.x, source.y, test_size=360, random_state=0, stratify=source.y
  )
  train, test, given, test_labels = parts
  return _images(train, given, test, test_labels, (64, 128, 10), 64, 2 if quick else 20)


def fashion(quick: bool, folder: pathlib.Path | None = None) -> Task:
  """Fashion-MNIST, 10,000 training images, MLP 784-256-256-10, batch 128, 5 epochs."""
  source = images.fashion(folder or images.FOLDER)
  size = 1000 if quick else 10_000
  widths = (784, 256, 256, 10)
  assert source.test is not None
  return _images(source.x[:size], source.y[:size], *source.test, widths, 128, 5)


def characters(quick: bool, folder: pathlib.Path | None = None) -> Task:
  """Characters of Python's own manual, a transformer of two layers, 400 steps."""
  del folder
  width, heads, length, batch, steps = 32, 2, 32, 16, 20 if quick else 400
  joined = "\n".join(topics.topics[name] for name in sorted(topics.topics))
  codes = np.frombuffer(joined[:300_000].encode("ascii", "ignore"), np.uint8)
  known, codes = np.unique(codes, return_inverse=True)
  train, test = jnp.asarray(codes[:-30_000]), jnp.asarray(codes[-30_000:])
  offsets = jnp.arange(length + 1)

  def setup(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[0])
    layers = [
      {
        "attend": normal(width, 3 * width),
        "merge": normal(width, width),
        "up": normal(width, 4 * width),
        "down": normal(4 * width, width),
      }
      for _ in range(2)
    ]
    params = {
      "embed": normal(len(known), width) * np.sqrt(len(known)) * 0.3,
      "place": normal(length, width) * np.sqrt(length) * 0.3,
      "layers": layers,
      "out": normal(width, len(known)),
    }
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(train) - length - 1, [steps, batch])
    return params, jnp.asarray(starts)

  def loss_on(params, windows):
    x = params["embed"][windows[:, :-1]] + params["place"]
    for layer in params["layers"]:
      parts = jnp.split(_normalized(x) @ layer["attend"], 3, axis=-1)
      q, k, v = (part.reshape(*part.shape[:2], heads, -1) for part in parts)
      attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
      x = x + attended.reshape(x.shape) @ layer["merge"]
      x = x + jax.nn.gelu(_normalized(x) @ layer["up"]) @ layer["down"]
    logits = _normalized(x) @ params["out"]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return cross_entropy(logits, windows[:, 1:]).mean()

  every = lambda data: data[(jnp.arange(128) * (len(data) // 130))[:, None] + offsets]
  return Task(
    setup,
    lambda params, starts: loss_on(params, train[starts[:, None] + offsets]),
    lambda params: loss_on(params, every(train)),
    lambda params: loss_on(params, every(test)),
    "held-out loss",
  )


def quadratic(quick: bool, folder: pathlib.Path | None = None) -> Task:
  """Fifty dimensions, curvatures from 0.001 to 10, 1,000 steps without noise."""
  del folder
  curvature = jnp.logspace(-3, 1, 50)
  loss = lambda params: 0.5 * (curvature * params**2).sum()

  def setup(seed):
    start = jax.random.normal(jax.random.key(seed), [50])
    return start, jnp.zeros([50 if quick else 1000])

  return Task(setup, lambda params, _: loss(params), loss, None, "training loss")


TASKS = {
  "digits": digits,
  "Fashion-MNIST": fashion,
  "characters": characters,
  "quadratic": quadratic,
}


def _images(train, labels, test, test_labels, widths, batch, epochs) -> Task:
  train, labels, test, test_labels = map(
    jnp.asarray, (train, labels.astype(np.int32), test, test_labels.astype(np.int32))
  )
  per_epoch = len(train) // batch

  def setup(seed):
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    sizes = zip(keys, widths[:-1], widths[1:], strict=True)
    params = [
      (jax.random.normal(key, [i, o]) / np.sqrt(i), jnp.zeros([o]))
      for key, i, o in sizes
    ]
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(train))[: per_epoch * batch] for _ in range(epochs)]
    return params, jnp.asarray(np.concatenate(orders).reshape(-1, batch))

  def logits(params, x):
    for kernel, bias in params[:-1]:
      x = jax.nn.relu(x @ kernel + bias)
    kernel, bias = params[-1]
    return x @ kernel + bias

  def loss(params, ids):
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return cross_entropy(logits(params, train[ids]), labels[ids]).mean()

  everything = jnp.arange(len(train))
  accuracy = lambda params: (logits(params, test).argmax(axis=-1) == test_labels).mean()
  return Task(
    setup, loss, lambda params: loss(params, everything), accuracy, "test accuracy"
  )


def _normalized(x: jax.Array) -> jax.Array:
  x = x - x.mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
