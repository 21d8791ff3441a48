"""One method, one kind of noise, one seed."""

import functools
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.learning.noisy_labels import data
from benchmarks.learning.noisy_labels import methods
from benchmarks.learning.noisy_labels import models
import optax_ranger as ranger


class History(NamedTuple):
  """What came of a training.

  Attributes:
    last: accuracy on clean test labels after the last epoch.
    selected: the same after the epoch that noisy validation labels chose.
    epoch: that epoch.
    tuning_last, tuning_selected: accuracy on noisy tuning labels, corrected for
      their noise.
    seconds: of training, with all that happens between epochs, without evaluation.
    validation, test: accuracy after each epoch; the second where asked for.
    wrong_share: of the pull of labels upon the network, how much is of wrong ones,
      after each epoch, where asked for.
    confusion: the matrix that the method ended with, or None.
  """

  last: float
  selected: float
  epoch: int
  tuning_last: float
  tuning_selected: float
  seconds: float
  validation: list[float]
  test: list[float]
  wrong_share: list[float]
  confusion: np.ndarray | None


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
  keep = jax.block_until_ready(_supported(model, params, problem, settings["k"]))
  between = time.perf_counter() - start
  again, _ = _train(method, model, problem, settings, seed + 1000, epochs, keep, pull)
  return again._replace(seconds=first.seconds + between + again.seconds)


def _supported(model: models.Model, params: Any, problem: data.Problem, k: float):
  """Keeps the labels that most neighbors have, in the space of the logits."""
  logits = model.logits(params, problem.images)
  neighbors = ranger.neighbors.nearest(logits, int(k))
  votes = jax.nn.one_hot(problem.labels[neighbors.indices], 10).sum(axis=1)
  return votes.argmax(axis=1) == problem.labels


def _train(method, model, problem, settings, seed, epochs, keep, pull):
  (n, inputs), batch = problem.images.shape, problem.batch
  settings = {**settings, "wrong": problem.wrong, "confusion": problem.confusion}
  traced = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), settings)
  init, run, validate, judge, pulls = _compiled(
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
  validation, test, shares, seconds = [], [], [], 0.0
  smooth = best = params
  for epoch in range(epochs):
    start = time.perf_counter()
    view = methods.View(
      epoch,
      jax.random.key(rng.integers(2**31)),
      problem.images,
      problem.labels,
      functools.partial(model.features, ranger.eval_params(state, params)),
      state,
    )
    memory = method.between(view, memory, settings)
    order = rng.permutation(n)[: n // batch * batch].reshape(-1, batch)
    params, state, memory = jax.block_until_ready(
      run(params, state, memory, order, problem.images, problem.labels, traced)
    )
    seconds += time.perf_counter() - start
    smooth = ranger.eval_params(state, params)
    validation.append(float(validate(smooth, problem)))
    if validation[-1] == max(validation):
      best = smooth
    if pull:
      test.append(float(judge(smooth, problem, inverse)[0]))
      amounts = np.asarray(pulls(smooth, memory, problem, traced))
      wrong = np.asarray(problem.labels != problem.true_labels)
      shares.append(float(amounts[wrong].sum() / max(amounts.sum(), 1e-9)))
  last, tuning_last = map(float, judge(smooth, problem, inverse))
  selected, tuning_selected = map(float, judge(best, problem, inverse))
  confusion = memory.get("confusion") if isinstance(memory, dict) else None
  history = History(
    last=last,
    selected=selected,
    epoch=len(validation) - validation[::-1].index(max(validation)),
    tuning_last=tuning_last,
    tuning_selected=tuning_selected,
    seconds=seconds,
    validation=validation,
    test=test,
    wrong_share=shares,
    confusion=None if confusion is None else np.asarray(confusion),
  )
  return history, best


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

  def guess(params, images):
    return logits_of(params, images).argmax(axis=-1)

  @jax.jit
  def validate(params, problem):
    guessed = guess(params, problem.validation_images)
    return (guessed == problem.validation_labels).mean()

  @jax.jit
  def judge(params, problem, inverse):
    tuned = guess(params, problem.tuning_images)
    labels = jnp.broadcast_to(problem.tuning_labels, tuned.shape)
    tested = guess(params, problem.test_images) == problem.test_labels
    return tested.mean(), inverse[labels, tuned].mean()

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

  return init, run, validate, judge, pulls
