"""One method, one kind of noise, one seed."""

import functools
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.noisy_labels import data
from benchmarks.noisy_labels import methods
from benchmarks.noisy_labels import models
import optax_ranger as ranger

BATCH = 128


class History(NamedTuple):
  """What came of a training; arrays are of one number an epoch.

  Attributes:
    validation: accuracy on noisy validation labels.
    test: accuracy on clean test labels.
    tuning: accuracy on noisy tuning labels, corrected for their noise.
    wrong_share: of the pull of labels upon the network, how much is of wrong ones.
    seconds: of training, with all that happens between epochs, without evaluation.
    confusion: the matrix that the method ended with, or None.
  """

  validation: np.ndarray
  test: np.ndarray
  tuning: np.ndarray
  wrong_share: np.ndarray
  seconds: float
  confusion: np.ndarray | None

  @property
  def selected(self) -> int:
    return int(self.validation.argmax())


def train(
  method: methods.Method,
  model: models.Model,
  problem: data.Problem,
  settings: methods.Settings,
  seed: int,
  epochs: int = 30,
  pull: bool = False,
) -> History:
  """Trains once, or twice where a first training chooses the second one's examples."""
  if not method.filtered:
    return _train(method, model, problem, settings, seed, epochs, None, pull)[0]
  first, params = _train(method, model, problem, settings, seed, epochs, None, False)
  start = time.perf_counter()
  keep = _supported(model, params, problem, settings["k"])
  between = time.perf_counter() - start
  again, _ = _train(method, model, problem, settings, seed + 1000, epochs, keep, pull)
  return again._replace(seconds=first.seconds + between + again.seconds)


def _supported(model: models.Model, params: Any, problem: data.Problem, k: float):
  """Keeps the labels that most neighbors have, in the space of the logits."""
  logits = model.logits(params, problem.images)
  neighbors = ranger.nearest_neighbors(logits, int(k))
  votes = jax.nn.one_hot(problem.labels[neighbors.indices], 10).sum(axis=1)
  return (votes.argmax(axis=1) == problem.labels).astype(jnp.float32)


def _train(method, model, problem, settings, seed, epochs, keep, pull):
  n, inputs = problem.images.shape
  settings = {**settings, "wrong": problem.wrong, "confusion": problem.confusion}
  traced = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), settings)
  init, run, evaluate, pulls = _compiled(
    method.losses, method.optimizer, method.networks, model, n
  )
  keys = jax.random.split(jax.random.key(seed), method.networks)
  params = jax.vmap(model.init, (0, None))(keys, inputs)
  if method.networks == 1:
    params = jax.tree.map(lambda leaf: leaf[0], params)
  state = init(params, traced)
  memory = method.memory(n, traced) if keep is None else keep
  inverse = jnp.asarray(np.linalg.inv(problem.confusion), jnp.float32)
  rng = np.random.default_rng([seed, 2])
  figures, shares, seconds, best, best_params = [], [], 0.0, -1.0, params
  for epoch in range(epochs):
    start = time.perf_counter()
    smoothed = functools.partial(ranger.eval_params, state, params)
    view = methods.View(
      epoch,
      epochs,
      jax.random.key(rng.integers(2**31)),
      problem.images,
      problem.labels,
      functools.partial(model.features, smoothed()),
      state,
    )
    memory = method.between(view, memory, settings)
    order = rng.permutation(n)[: n // BATCH * BATCH].reshape(-1, BATCH)
    params, state, memory = jax.block_until_ready(
      run(params, state, memory, order, problem.images, problem.labels, traced)
    )
    seconds += time.perf_counter() - start
    figures.append([float(x) for x in evaluate(params, state, problem, inverse)])
    if figures[-1][0] > best:
      best, best_params = figures[-1][0], smoothed()
    if pull:
      amounts = np.asarray(pulls(smoothed(), memory, problem, traced))
      wrong = np.asarray(problem.labels != problem.true_labels)
      shares.append(float(amounts[wrong].sum() / max(amounts.sum(), 1e-9)))
  confusion = memory.get("confusion") if isinstance(memory, dict) else None
  confusion = None if confusion is None else np.asarray(confusion)
  validation, test, tuning = np.array(figures).T
  shares = np.array(shares)
  history = History(validation, test, tuning, shares, seconds, confusion)
  return history, best_params


@functools.cache
def _compiled(
  losses_of: Any, optimizer: Any, networks: int, model: models.Model, num_examples: int
):
  """The programs of a method; its settings are traced, so that they serve for all."""
  logits_of = model.logits
  if networks > 1:
    logits_of = jax.vmap(model.logits, (0, None))

  @jax.jit
  def init(params, settings):
    return optimizer(settings, num_examples).init(params)

  @jax.jit
  def run(params, state, memory, order, images, labels, settings):
    tx = optimizer(settings, num_examples)

    def step(carry, ids):
      params, state, memory = carry

      def loss(params):
        logits = logits_of(params, images[ids])
        losses, after = losses_of(logits, labels[ids], ids, memory, settings)
        return networks * losses.mean(), (logits, after)

      gradient, (logits, memory) = jax.grad(loss, has_aux=True)(params)
      updates, state = tx.update(
        gradient,
        state,
        params,
        predictions=jax.nn.softmax(logits),
        example_ids=ids,
      )
      return (optax.apply_updates(params, updates), state, memory), None

    return jax.lax.scan(step, (params, state, memory), order)[0]

  @jax.jit
  def evaluate(params, state, problem, inverse):
    params = ranger.eval_params(state, params)
    guess = lambda images: logits_of(params, images).argmax(axis=-1)
    tuning = guess(problem.tuning_images)
    return (
      (guess(problem.validation_images) == problem.validation_labels).mean(),
      (guess(problem.test_images) == problem.test_labels).mean(),
      inverse[jnp.broadcast_to(problem.tuning_labels, tuning.shape), tuning].mean(),
    )

  @jax.jit
  def pulls(params, memory, problem, settings):
    """How hard each loss pulls the network towards the given label."""
    ids = jnp.arange(num_examples)

    def total(logits):
      return losses_of(logits, problem.labels, ids, memory, settings)[0].sum()

    slopes = jax.grad(total)(logits_of(params, problem.images))
    rows = jnp.broadcast_to(problem.labels[:, None], (*slopes.shape[:-1], 1))
    toward = -jnp.take_along_axis(slopes, rows, axis=-1)[..., 0]
    toward = jnp.maximum(toward, 0)
    return toward if networks == 1 else toward.mean(axis=0)

  return init, run, evaluate, pulls
