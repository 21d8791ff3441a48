"""One training: a method, a network, a problem, settings and a seed."""

from collections.abc import Callable
import functools
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.learning import _method
from benchmarks.learning import _models
from benchmarks.learning.problems import Problem
import optax_ranger as ranger

_ROWS = 128  # of a block


class History(NamedTuple):
  """What came of a training. Figures are accuracies, or of numbers R².

  Attributes:
    last: the figure on clean test examples after the last epoch.
    selected: the same after the epoch that noisy validation examples chose.
    epoch: that epoch.
    tuning_last, tuning_selected: the figure on noisy tuning examples, corrected for
      noise that depends on the class only; that of validation where there are none.
    seconds: of training, with all that happens between epochs, without evaluation.
    validation, test: the figure after each epoch; the second where asked for.
    wrong_share: the share of the labels' pull on the network that comes from wrong
      labels, after each epoch, where asked for; of classes only.
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


class Fit(NamedTuple):
  """Trains for methods that choose their examples by a first training.

  A call trains on a problem, without the choice, and returns the function that gives
  the logits of rows.
  """

  method: _method.Method
  model: str
  settings: _method.Settings
  seed: int
  epochs: int

  def __call__(
    self, problem: Problem, *, model: str = "", epochs: float = 1.0
  ) -> Callable[[jax.Array], jax.Array]:
    """Trains for a share of the epochs, maybe another model."""
    method = self.method._replace(
      choose=None, losses=_method.usual_losses, memory=_method.no_memory
    )
    count = max(1, round(epochs * self.epochs))
    name = model or self.model
    _, params = _train(
      method, name, problem, self.settings, self.seed, count, None, False
    )
    network = _network(name, problem)
    return lambda x: network.logits(params, x)


def train(
  method: _method.Method,
  model: str,
  problem: Problem,
  settings: _method.Settings,
  seed: int,
  epochs: int = 30,
  pull: bool = False,
) -> History:
  """Trains, after a first training where that chooses the examples."""
  if method.choose is None:
    return _train(method, model, problem, settings, seed, epochs, None, pull)[0]
  start = time.perf_counter()
  fit = Fit(method, model, settings, seed, epochs)
  keep = jax.block_until_ready(method.choose(problem, fit, settings))
  before = time.perf_counter() - start
  again, _ = _train(method, model, problem, settings, seed + 1000, epochs, keep, pull)
  return again._replace(seconds=before + again.seconds)


def _network(model: str, problem: Problem) -> _models.Network:
  return _models.Network(model, problem.train.x.shape[1], max(problem.classes, 1))


def _train(method, model, problem, settings, seed, epochs, keep, pull):
  (x, y), n, steps = problem.train, len(problem.train.y), problem.steps
  sizes = _method.Sizes(n, problem.classes)
  network = _network(model, problem)
  known = np.eye(max(problem.classes, 1))
  if problem.confusion is not None:
    known = problem.confusion
  settings = {**settings, "wrong": problem.wrong, "confusion": known}
  traced = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), settings)
  programs = _compiled(
    method.losses,
    method.optimizer,
    method.extra,
    method.aggregate,
    method.networks,
    network,
    sizes,
  )
  each = [network.init(seed + 7919 * i) for i in range(method.networks)]
  params = each[0]
  if method.networks > 1:
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
  state = programs.init(params, traced)
  start = time.perf_counter()
  memory = method.memory(x, y, sizes, settings) if keep is None else keep
  jax.block_until_ready(memory)
  seconds = time.perf_counter() - start
  rng = np.random.default_rng([seed, 2])
  validation, test, shares = [], [], []
  smooth = best = params
  for epoch in range(epochs):
    start = time.perf_counter()
    view = _method.View(
      epoch,
      epochs,
      jax.random.key(rng.integers(2**31)),
      x,
      y,
      functools.partial(programs.features, smooth, x),
      functools.partial(programs.logits, smooth, x),
      state,
    )
    memory = method.between(view, memory, settings)
    rounds = -(-steps * problem.batch // n)
    order = np.concatenate([rng.permutation(n) for _ in range(rounds)])
    order = order[: steps * problem.batch].reshape(steps, problem.batch)
    params, state, memory = jax.block_until_ready(
      programs.run(params, state, memory, order, x, y, traced)
    )
    seconds += time.perf_counter() - start
    smooth = ranger.eval_params(state, params)
    reached = float(programs.validate(smooth, problem.valid))
    validation.append(reached if np.isfinite(reached) else -np.inf)
    if validation[-1] == max(validation):
      best = smooth
    if pull:
      test.append(float(programs.test(smooth, problem.test)))
    if pull and problem.classes:
      amounts = np.asarray(programs.pulls(smooth, memory, x, y, traced))
      wrong = np.asarray(y != problem.true)
      shares.append(float(amounts[wrong].sum() / max(amounts.sum(), 1e-9)))
  chosen = epochs - 1 - validation[::-1].index(max(validation))
  last, selected = (float(programs.test(at, problem.test)) for at in (smooth, best))
  tuning = validation[-1], validation[chosen]
  if len(problem.tuning.y):
    # Errors that depend on more than the class can't be corrected for.
    corrected = known if problem.confusion is not None else np.eye(len(known))
    inverse = jnp.asarray(np.linalg.inv(corrected), jnp.float32)
    tuning = tuple(
      float(programs.tune(at, problem.tuning, inverse)) for at in (smooth, best)
    )
  confusion = getattr(memory, "confusion", None)
  history = History(
    last=last,
    selected=selected,
    epoch=chosen + 1,
    tuning_last=tuning[0],
    tuning_selected=tuning[1],
    seconds=seconds,
    validation=validation,
    test=test,
    wrong_share=shares,
    confusion=None if confusion is None else np.asarray(confusion),
  )
  return history, best


class _Programs(NamedTuple):
  init: Any
  run: Any
  logits: Any
  features: Any
  validate: Any
  tune: Any
  test: Any
  pulls: Any


def _chain(optimizer, settings, sizes):
  # Extra args that an optimizer does not know are no error here.
  return optax.with_extra_args_support(optimizer(settings, sizes))


@functools.cache
def _compiled(
  losses_of: Any,
  optimizer: Any,
  extra: Any,
  aggregate: Any,
  networks: int,
  network: _models.Network,
  sizes: _method.Sizes,
) -> _Programs:
  """The programs of a method. Its settings are traced: one program for all of them."""
  logits_of, features_of = network.logits, network.features
  if networks > 1:
    logits_of = jax.vmap(logits_of, (0, None))
    features_of = jax.vmap(features_of, (0, None))

  @jax.jit
  def init(params, settings):
    return _chain(optimizer, settings, sizes).init(params)

  def gradient(params, batch, ids, memory, settings):
    def mean(params):
      logits = logits_of(params, batch["x"])
      losses, after = losses_of(logits, batch["y"], ids, memory, settings)
      return networks * losses.mean(), (logits, after)

    def each(params, batch):
      logits = logits_of(params, batch["x"])
      losses, _ = losses_of(logits, batch["y"], ids, memory, settings)
      return losses, jax.lax.stop_gradient(logits)

    if aggregate is None:
      found, (logits, memory) = jax.grad(mean, has_aux=True)(params)
      return found, logits, memory
    step = aggregate(settings)
    (_, logits), found = ranger.value_and_grad(
      each, step, has_aux=True, micro_batch_size=len(ids)
    )(params, batch)
    return found, logits, memory

  @jax.jit
  def run(params, state, memory, order, x, y, settings):
    tx = _chain(optimizer, settings, sizes)

    def step(carry, ids):
      params, state, memory = carry
      batch = {"x": x[ids], "y": y[ids]}
      found, logits, memory = gradient(params, batch, ids, memory, settings)
      told = {"example_ids": ids, **extra(memory)}
      if sizes.classes:
        told["predictions"] = jax.nn.softmax(logits)
      updates, state = tx.update(found, state, params, **told)
      return (optax.apply_updates(params, updates), state, memory), None

    return jax.lax.scan(step, (params, state, memory), order)[0]

  def hits(params, rows):
    return logits_of(params, rows.x).argmax(axis=-1) == rows.y

  @jax.jit
  def validate(params, rows):
    if sizes.classes:
      return hits(params, rows).mean()
    # Large errors count less than in a square; higher is better.
    return -jnp.log(jnp.abs(logits_of(params, rows.x)[:, 0] - rows.y).mean())

  @jax.jit
  def tune(params, rows, inverse):
    guessed = logits_of(params, rows.x).argmax(axis=-1)
    return inverse[jnp.broadcast_to(rows.y, guessed.shape), guessed].mean()

  @jax.jit
  def test(params, rows):
    if sizes.classes:
      return hits(params, rows).mean()
    errors = logits_of(params, rows.x)[:, 0] - rows.y
    return 1 - (errors**2).mean() / jnp.var(rows.y)

  @jax.jit
  def pulls(params, memory, x, y, settings):
    """How hard each loss pulls the network towards the given label."""
    ids = jnp.arange(sizes.examples)
    total = lambda logits: losses_of(logits, y, ids, memory, settings)[0].sum()
    slopes = jax.grad(total)(logits_of(params, x))
    rows = jnp.broadcast_to(y[:, None], (*slopes.shape[:-1], 1))
    toward = -jnp.take_along_axis(slopes, rows, axis=-1)[..., 0]
    toward = jnp.maximum(toward, 0)
    return toward if networks == 1 else toward.mean(axis=0)

  def by_blocks(function):
    """Of all training rows; intermediate values of a block fit into a cache."""

    def run(params, x):
      of_row = lambda row: function(params, row[None])[..., 0, :]
      rows = jax.lax.map(of_row, x, batch_size=_ROWS)
      return jnp.moveaxis(rows, 0, -2)

    return jax.jit(run)

  return _Programs(
    init, run, by_blocks(logits_of), by_blocks(features_of), validate, tune, test, pulls
  )
