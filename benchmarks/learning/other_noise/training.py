"""Training on noisy data, the same for every method but for losses and weights.

Gradients are clipped to norm 1, then weight decay and Nesterov's momentum.
"""

from collections.abc import Callable
import itertools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.learning.other_noise import noise as noises
import optax_ranger as ranger

ROUNDS, BATCH, WIDTH = 40, 32, 64
# Passes over the rows in a round.
_PASSES = {
  "digits": 1,
  "breast_cancer": 2,
  "wine": 4,
  "diabetes": 2,
  "friedman1": 1,
}
RATE = 0.05
_EMA, _DECAY, _MEMORY = 0.99, 1e-3, 0.7


class Run(NamedTuple):
  """One training: the data, the rows of all steps and the parameters to start with.

  Attributes:
    data: what `noises.load` gives.
    ids: ``int [rounds, steps, batch]``.
    params: of the network.
    classes: how many; 0 for targets that are numbers.
  """

  data: noises.Data
  ids: jax.Array
  params: Any
  classes: int

  @property
  def there(self) -> jax.Array:
    """Which training rows are not there to fill up."""
    return jnp.arange(len(self.data.x)) < self.data.count


class Fitted(NamedTuple):
  """A trained network, and how it did after every round."""

  params: Any
  state: Any
  memory: Any
  valid: jax.Array
  test: jax.Array

  @property
  def mean(self) -> Any:
    return ranger.eval_params(self.state, self.params)

  @property
  def curves(self) -> tuple[jax.Array, jax.Array]:
    return self.valid, self.test


def features(params: Any, x: jax.Array) -> jax.Array:
  for kernel, bias in params[:-1]:
    x = jax.nn.relu(x @ kernel + bias)
  return x


def outputs(params: Any, x: jax.Array) -> jax.Array:
  kernel, bias = params[-1]
  return features(params, x) @ kernel + bias


def start(problem: str, data: noises.Data, seed: int, rounds: int = ROUNDS) -> Run:
  """The same parameters and as many steps for every method and kind of noise."""
  classes = 0 if noises.task(problem) == "numbers" else int(data.test_y.max()) + 1
  rng = np.random.default_rng(seed)
  sizes = (data.x.shape[1], WIDTH, classes or 1)
  params = [
    (
      (rng.standard_normal([i, o]) * np.sqrt(2 / i)).astype(np.float32),
      np.zeros(o, np.float32),
    )
    for i, o in itertools.pairwise(sizes)
  ]
  clean = len(data.x) // (2 if classes else 1)
  steps = clean * _PASSES[problem] // BATCH
  count, orders = int(data.count), []
  for _ in range(-(-rounds * steps * BATCH // count)):
    orders.append(rng.permutation(count))
  ids = np.concatenate(orders)[: rounds * steps * BATCH].reshape(rounds, steps, BATCH)
  return Run(data, jnp.asarray(ids, jnp.int32), params, classes)


def fit(
  run: Run,
  losses: Callable[..., Any],
  *,
  rate: Any = RATE,
  ema: float | None = _EMA,
  step: Any = None,
  weights: Any = None,
  ids: Any = None,
  warm: Fitted | None = None,
) -> Fitted:
  """Trains; goes on from `warm`, where it is given.

  Args:
    run: the data and the start.
    losses: ``(outputs, y, smoothed) -> losses [n]``.
    rate: the learning rate.
    ema: the decay of smoothed parameters; None evaluates the last ones.
    step: over the per-example gradients; None for their mean.
    weights: of the training rows; None for equal ones.
    ids: rows of the steps; None for all.
    warm: what was trained before.
  """
  data = run.data
  step = ranger.aggregate_by_mean() if step is None else step
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.add_decayed_weights(_DECAY),
    optax.sgd(rate, momentum=0.9, nesterov=True),
    *([] if ema is None else [ranger.smooth_by_ema(ema)]),
  )
  table = ranger.smooth_predictions(len(data.x), max(run.classes, 1), _MEMORY)
  weights = jnp.ones(len(data.x)) if weights is None else weights

  def per_example(params, batch, smoothed):
    out = outputs(params, batch["x"])
    return losses(out, batch["y"], smoothed), jax.lax.stop_gradient(out)

  grad_fn = ranger.value_and_grad(
    per_example, step, has_aux=True, micro_batch_size=BATCH
  )

  def update(carry, ids):
    params, state, memory = carry
    batch = {"x": jnp.asarray(data.x)[ids], "y": jnp.asarray(data.y)[ids]}
    smoothed = ranger.smoothed_predictions(memory, ids)
    (_, out), grads = grad_fn(
      params, batch, smoothed=smoothed, member_weights=weights[ids]
    )
    updates, state = tx.update(grads, state, params)
    if run.classes:
      _, memory = table.update(
        {}, memory, predictions=jax.nn.softmax(out), example_ids=ids
      )
    return (optax.apply_updates(params, updates), state, memory), None

  def one_round(carry, ids):
    carry, _ = jax.lax.scan(update, carry, ids)
    params = ranger.eval_params(carry[1], carry[0])
    return carry, (
      validation(params, data.valid_x, data.valid_y, run.classes),
      score(params, data.test_x, data.test_y, run.classes),
    )

  if warm is None:
    carry = run.params, tx.init(run.params), table.init({})
  else:
    carry = warm.params, warm.state, warm.memory
  carry, (valid, test) = jax.lax.scan(one_round, carry, run.ids if ids is None else ids)
  if warm is not None:
    valid, test = (
      jnp.concatenate([warm.valid, valid]),
      jnp.concatenate([warm.test, test]),
    )
  return Fitted(*carry, valid, test)


def score(params: Any, x: Any, y: Any, classes: int) -> jax.Array:
  """Accuracy, or the share of the variance that is explained."""
  out = outputs(params, x)
  if classes:
    return (out.argmax(axis=1) == y).mean()
  return 1 - ((out[:, 0] - y) ** 2).mean() / jnp.var(y)


def validation(params: Any, x: Any, y: Any, classes: int) -> jax.Array:
  """Accuracy, or minus the logarithm of the mean absolute error, where rows are."""
  there = jnp.isfinite(x).all(axis=1)
  out = outputs(params, jnp.where(there[:, None], x, 0))
  if classes:
    return jnp.mean(out.argmax(axis=1) == y, where=there)
  error = jnp.abs(out[:, 0] - jnp.where(there, y, 0))
  return -jnp.log(jnp.mean(error, where=there))
