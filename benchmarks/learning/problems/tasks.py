"""Small tasks of optimization: a loss by the parameters and the inputs of a step."""

from collections.abc import Callable
from collections.abc import Sequence
import itertools
import pathlib
from pydoc_data import topics
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import model_selection

from benchmarks.learning import _models
from benchmarks.learning.problems import images
from benchmarks.learning.problems import small


class Task(NamedTuple):
  """All it takes to train, from any seed.

  Attributes:
    setup: the parameters and the inputs of all steps, by the seed.
    loss: the loss of parameters on the inputs of one step.
    train_loss: the loss that is compared.
    test: the figure on data that is held out, or None.
  """

  setup: Callable[[int], tuple[Any, Any]]
  loss: Callable[[Any, Any], jax.Array]
  train_loss: Callable[[Any], jax.Array]
  test: Callable[[Any], jax.Array] | None


class Spec(NamedTuple):
  """How a task is built, and how its figure is judged.

  Attributes:
    build: by whether it is only tried out, and a folder of data.
    figure: what `Task.test`, or else the training loss, is called.
    higher: whether more is better.
    near: how far from a reference counts as about as good.
    factor: whether `near` is a factor, not a difference.
  """

  build: Callable[[bool, pathlib.Path | None], Task]
  figure: str = "test accuracy"
  higher: bool = True
  near: float = 0.01
  factor: bool = False

  def finite(self, values: np.ndarray) -> np.ndarray:
    """The figures; one that diverged is as bad as can be."""
    return np.where(np.isfinite(values), values, -np.inf if self.higher else np.inf)

  def best(self, values: np.ndarray) -> float:
    return values.max() if self.higher else values.min()

  def worst(self, values: np.ndarray) -> np.ndarray:
    """Of the seeds, the last axis."""
    return values.min(axis=-1) if self.higher else values.max(axis=-1)

  def good(self, values: np.ndarray, reference: float) -> np.ndarray:
    """Which figures are about as good as the reference, or better."""
    if self.factor:
      # Below 1e-9, all are as good.
      return values <= self.near * max(reference, 1e-9)
    sign = 1 if self.higher else -1
    return sign * values >= sign * reference - self.near


def train(
  task: Task, make: Callable[[Any, int], Any], settings: jax.Array, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Trains with every setting and from every seed at once.

  Args:
    task: what to train.
    make: an optimizer, of a setting and the number of steps.
    settings: by their first axis.
    seeds: of parameters and inputs.

  Returns:
    The training loss and the figure on held-out data, each [settings, seeds].
  """

  def one(setting, params, inputs):
    tx = make(setting, len(inputs))

    def step(carry, inputs):
      params, state = carry
      value, gradient = jax.value_and_grad(task.loss)(params, inputs)
      updates, state = tx.update(gradient, state, params, value=value)
      return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), inputs)
    params = small.evaluated(state, params)
    loss = task.train_loss(params)
    return loss, loss if task.test is None else task.test(params)

  starts = [task.setup(seed) for seed in seeds]
  params, inputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
  over_seeds = jax.vmap(one, (None, 0, 0))
  both = jax.jit(jax.vmap(over_seeds, (0, None, None)))
  loss, test = both(settings, params, inputs)
  return np.asarray(loss), np.asarray(test)


def digits(quick: bool, folder: pathlib.Path | None = None) -> Task:
  """Scikit-learn's digits, MLP 64-128-10, batch 64, 20 epochs."""
  shapes, epochs = _dense(64, 128, 10), 2 if quick else 20
  return _classes(*_digits(folder), shapes, _mlp, 64, epochs)


def fashion(quick: bool, folder: pathlib.Path | None = None) -> Task:
  """Fashion-MNIST, 10,000 training images, MLP 784-256-256-10, batch 128, 5 epochs."""
  return _classes(*_fashion(quick, folder), _dense(784, 256, 256, 10), _mlp, 128, 5)


def convolutions(quick: bool, folder: pathlib.Path | None = None) -> Task:
  """The same images, two convolutions of 5 x 5 and two dense layers, 5 epochs."""

  def logits(params, x):
    x = x.reshape(-1, 28, 28, 1)
    for kernel, bias in params[:2]:
      x = jax.nn.relu(_models.patches(x) @ kernel + bias)
    return _mlp(params[2:], x.reshape(len(x), -1))

  shapes = [(25, 8), (200, 16), *_dense(784, 64, 10)]
  return _classes(*_fashion(quick, folder), shapes, logits, 128, 1 if quick else 5)


def recurrent(quick: bool, folder: pathlib.Path | None = None) -> Task:
  """Digits read two pixels at a time, a GRU of 48, batch 64, 15 epochs."""
  width, read = 48, 2

  def logits(params, x):
    (inward, bias), (across, _), head = params

    def step(state, pixels):
      ours = jnp.split(pixels @ inward + bias, 3, axis=-1)
      theirs = jnp.split(state @ across, 3, axis=-1)
      reset, keep = (jax.nn.sigmoid(ours[i] + theirs[i]) for i in range(2))
      new = jnp.tanh(ours[2] + reset * theirs[2])
      return keep * state + (1 - keep) * new, None

    pixels = x.reshape(len(x), -1, read).swapaxes(0, 1)
    state, _ = jax.lax.scan(step, jnp.zeros([len(x), width]), pixels)
    return _mlp([head], state)

  shapes = [(read, 3 * width), (width, 3 * width), (width, 10)]
  return _classes(*_digits(folder), shapes, logits, 64, 1 if quick else 15)


def factorization(quick: bool, folder: pathlib.Path | None = None) -> Task:
  """Ratings of 200 x 150, rank 5 and noise, 12 % seen; factors of rank 8."""
  del folder
  rows, columns, batch, epochs = 200, 150, 256, 2 if quick else 100
  rng = np.random.default_rng(0)
  true = rng.normal(size=[rows, 5]) @ rng.normal(size=[5, columns]) / np.sqrt(5)
  ratings = jnp.asarray(true + 0.3 * rng.normal(size=true.shape), jnp.float32)
  order = rng.permutation(rows * columns)
  seen, unseen = np.split(order, [round(0.12 * len(order))])
  per_epoch = len(seen) // batch

  def setup(seed):
    keys = jax.random.split(jax.random.key(seed))
    sizes = zip(keys, (rows, columns), strict=True)
    params = [0.1 * jax.random.normal(key, [size, 8]) for key, size in sizes]
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(seen)[: per_epoch * batch] for _ in range(epochs)]
    return params, jnp.asarray(np.concatenate(orders).reshape(-1, batch))

  def errors(params, places):
    row, column = places // columns, places % columns
    guess = (params[0][row] * params[1][column]).sum(axis=-1)
    return ((guess - ratings[row, column]) ** 2).mean()

  def loss(params, places):
    used = params[0][places // columns], params[1][places % columns]
    penalty = sum((x**2).sum(axis=-1).mean() for x in used)
    return errors(params, places) + 0.03 * penalty

  return Task(
    setup,
    loss,
    lambda params: loss(params, jnp.asarray(seen)),
    lambda params: jnp.sqrt(errors(params, jnp.asarray(unseen))),
  )


def policy_gradient(quick: bool, folder: pathlib.Path | None = None) -> Task:
  """REINFORCE on CartPole, 16 episodes of up to 200 steps at a time, 150 times."""
  del folder
  shapes, length = _dense(4, 32, 2), 200

  def episodes(params, key, count):
    """The log chances of what was done and whether the pole stood, by the time."""

    def step(carry, key):
      state, standing = carry
      logits = _mlp(params, state)
      action = jax.random.categorical(key, jax.lax.stop_gradient(logits))
      chance = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
      state = _cart_pole(state, 2 * action - 1)
      lost = (abs(state[:, 0]) > 2.4) | (abs(state[:, 2]) > np.pi / 15)
      return (state, standing & ~lost), (chance, standing)

    first, key = jax.random.split(key)
    start = jax.random.uniform(first, [count, 4], minval=-0.05, maxval=0.05)
    carry = start, jnp.ones([count], bool)
    return jax.lax.scan(step, carry, jax.random.split(key, length))[1]

  def loss(params, key):
    chances, standing = episodes(params, key, 16)
    to_come = jnp.cumsum(standing[::-1], axis=0)[::-1]
    gain = to_come - to_come.mean(axis=1, keepdims=True)
    return -(chances * gain * standing).sum(axis=0).mean() / length

  def mean_return(params, seed):
    return episodes(params, jax.random.key(seed), 64)[1].sum(axis=0).mean()

  def setup(seed):
    first, rest = jax.random.split(jax.random.key(seed))
    return _layers(first, shapes), jax.random.split(rest, 5 if quick else 150)

  return Task(
    setup,
    loss,
    lambda params: length + 1 - mean_return(params, 1_000_000),
    lambda params: mean_return(params, 1_000_001),
  )


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
  )


def quadratic(quick: bool, folder: pathlib.Path | None = None) -> Task:
  """Fifty dimensions, curvatures from 0.001 to 10, 1,000 steps without noise."""
  del folder
  curvature = jnp.logspace(-3, 1, 50)
  loss = lambda params: 0.5 * (curvature * params**2).sum()

  def setup(seed):
    start = jax.random.normal(jax.random.key(seed), [50])
    return start, jnp.zeros([50 if quick else 1000])

  return Task(setup, lambda params, _: loss(params), loss, None)


TASKS = {
  "digits": Spec(digits),
  "Fashion-MNIST": Spec(fashion),
  "CNN": Spec(convolutions),
  "recurrent": Spec(recurrent),
  "characters": Spec(characters, "held-out loss", False, 0.05),
  "factorization": Spec(factorization, "held-out RMSE", False, 0.02),
  "policy gradient": Spec(policy_gradient, "mean return", True, 10),
  "quadratic": Spec(quadratic, "training loss", False, 10, factor=True),
}
# Tasks whose data is that of another one.
SHARED = {"CNN": "Fashion-MNIST"}


def _digits(folder):
  source = images.digits(folder)
  train, test, given, test_labels = model_selection.train_test_split(
    source.x, source.y, test_size=360, random_state=0, stratify=source.y
  )
  return train, given, test, test_labels


def _fashion(quick, folder):
  source, size = images.fashion(folder or images.FOLDER), 1000 if quick else 10_000
  assert source.test is not None
  return source.x[:size], source.y[:size], *source.test


def _classes(train, labels, test, test_labels, shapes, logits, batch, epochs) -> Task:
  """Layers of these shapes, trained for the cross-entropy."""
  train, labels, test, test_labels = map(
    jnp.asarray, (train, labels.astype(np.int32), test, test_labels.astype(np.int32))
  )
  per_epoch = len(train) // batch

  def setup(seed):
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(train))[: per_epoch * batch] for _ in range(epochs)]
    params = _layers(jax.random.key(seed), shapes)
    return params, jnp.asarray(np.concatenate(orders).reshape(-1, batch))

  def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  def every(params, x):
    # In parts: all at once would not fit, with a network for each rate and seed.
    return jax.lax.map(lambda x: logits(params, x[None])[0], x, batch_size=500)

  return Task(
    setup,
    lambda params, ids: cross_entropy(logits(params, train[ids]), labels[ids]),
    lambda params: cross_entropy(every(params, train), labels),
    lambda params: (every(params, test).argmax(axis=-1) == test_labels).mean(),
  )


def _dense(*widths: int) -> list[tuple[int, int]]:
  return list(itertools.pairwise(widths))


def _layers(key: jax.Array, shapes: Sequence[tuple[int, int]]) -> list[Any]:
  keys = jax.random.split(key, len(shapes))
  return [
    (jax.random.normal(key, shape) / np.sqrt(shape[0]), jnp.zeros(shape[1:]))
    for key, shape in zip(keys, shapes, strict=True)
  ]


def _mlp(params: Any, x: jax.Array) -> jax.Array:
  for kernel, bias in params[:-1]:
    x = jax.nn.relu(x @ kernel + bias)
  kernel, bias = params[-1]
  return x @ kernel + bias


def _cart_pole(state: jax.Array, direction: jax.Array) -> jax.Array:
  """A step of 0.02 s under a force of 10 N; cart of 1 kg, pole of 0.1 kg and 1 m."""
  _, speed, angle, turn = state.T
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  push = (10 * direction + 0.05 * turn**2 * sin) / 1.1
  turning = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
  moving = push - 0.05 * turning * cos / 1.1
  change = jnp.stack([speed, moving, turn, turning], axis=-1)
  return state + 0.02 * change


def _normalized(x: jax.Array) -> jax.Array:
  x = x - x.mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
