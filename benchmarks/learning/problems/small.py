"""Fifteen small problems that are hard for one reason each; a loss tells who passes.

Problems and thresholds were chosen with Optax's optimizers only: of AdamW, NAdamW and
SGD with momentum, at constant rates of 1e-5 to 1, some pass each, and some do not.
The idea, and some of the functions, are LightBench's.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib


class Small(NamedTuple):
  """A problem, and what counts as solved.

  Attributes:
    setup: the first parameters, by a key.
    loss: by parameters and the number of the step.
    steps: how many there are.
    threshold: the mean loss of the last hundredth of steps shall be below.
    spoil: what optimizers see of a gradient, by a key.
    delay: of how many steps ago the gradient is.
  """

  setup: Callable[[jax.Array], Any]
  loss: Callable[[Any, Any], jax.Array]
  steps: int
  threshold: float
  spoil: Callable[[jax.Array, jax.Array], jax.Array] = lambda gradient, key: gradient
  delay: int = 0


def evaluated(state: Any, params: Any) -> Any:
  """The parameters to judge, where an optimizer trains at others."""
  if isinstance(state, contrib.ScheduleFreeState):
    return contrib.schedule_free_eval_params(state, params)
  return params


def final_loss(problem: Small, tx: Any, seed: Any) -> jax.Array:
  """The mean loss of the last hundredth of steps."""
  first, rest = jax.random.split(jax.random.key(seed))
  params, places = problem.setup(first), problem.delay + 1
  both = jax.value_and_grad(problem.loss)
  old = jax.tree.map(lambda x: jnp.stack([x] * places), both(params, 0)[1])

  def step(carry, inputs):
    params, state, old = carry
    i, key = inputs
    value, gradient = both(params, i)
    old = jax.tree.map(lambda x, new: x.at[i % places].set(new), old, gradient)
    seen = jax.tree.map(lambda x: problem.spoil(x[(i + 1) % places], key), old)
    updates, state = tx.update(seen, state, params, value=value)
    params = optax.apply_updates(params, updates)
    return (params, state, old), problem.loss(evaluated(state, params), i)

  inputs = jnp.arange(problem.steps), jax.random.split(rest, problem.steps)
  _, losses = jax.lax.scan(step, (params, tx.init(params), old), inputs)
  return losses[-max(1, problem.steps // 100) :].mean()


def final_losses(problem: Small, make: Callable[[int], Any], seeds: int) -> np.ndarray:
  """What an optimizer, made for a number of steps, ends with from each seed."""
  run = jax.jit(jax.vmap(lambda seed: final_loss(problem, make(problem.steps), seed)))
  return np.asarray(run(jnp.arange(seeds)))


def _normal(*shape: int, scale: float = 1.0) -> Callable[[jax.Array], jax.Array]:
  return lambda key: scale * jax.random.normal(key, shape)


def _near(*place: float) -> Callable[[jax.Array], jax.Array]:
  return lambda key: jnp.array(place) + 0.1 * jax.random.normal(key, [len(place)])


def _signs(low: float, high: float) -> Callable[[jax.Array], jax.Array]:
  def setup(key):
    size, sign = jax.random.split(key)
    return jax.random.uniform(size, [20], minval=low, maxval=high) * (
      jax.random.rademacher(sign, [20])
    )

  return setup


_TURN = jnp.asarray(
  np.linalg.qr(np.random.default_rng(0).normal(size=[20, 20]))[0], jnp.float32
)


def _bowl(condition: float) -> Callable[[Any, Any], jax.Array]:
  """A quadratic of 20 dimensions, turned, of this condition number."""
  curvature = jnp.logspace(0, -np.log10(condition), 20)
  return lambda x, _: (curvature * (_TURN @ x) ** 2).sum()


def _rosenbrock(x, _):
  return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def _beale(x, _):
  wanted, powers = jnp.array([1.5, 2.25, 2.625]), jnp.array([1, 2, 3])
  return ((wanted - x[0] + x[0] * x[1] ** powers) ** 2).sum()


def _saddle(x, _):
  """Five directions are convex; the others start at the top of a double well."""
  return (x[:5] ** 2).mean() + ((x[5:] ** 2 - 1) ** 2).mean()


def _saddle_start(key):
  return jax.random.normal(key, [10]) * jnp.repeat(jnp.array([1.0, 1e-6]), 5)


def _moving(x, step):
  target = jnp.sin(2 * np.pi * (step / 500 + jnp.arange(20) / 20))
  return ((x - target) ** 2).mean()


def _breathing(x, step):
  """The scale goes from 1e3 to 1e-3 and back, twice."""
  return 10 ** (3 * jnp.cos(4 * np.pi * step / 2000)) * _bowl(100)(x, step)


def _layers_start(key):
  keys, scales = jax.random.split(key, 3), (0.01, 1.0, 100.0)
  return [
    s * _normal(8, 8, scale=8**-0.5)(k) for k, s in zip(keys, scales, strict=True)
  ]


def _layers(layers, _):
  """A product of matrices of very different sizes, to become a turn."""
  return ((layers[0] @ layers[1] @ layers[2] - jnp.eye(8)) ** 2).sum() / 8


_BITS = jnp.asarray((np.arange(16)[:, None] >> np.arange(4)) & 1, jnp.float32)


def _parity_start(key):
  keys = jax.random.split(key, 2)
  return _normal(5, 16)(keys[0]), _normal(17, scale=0.25)(keys[1])


def _parity(params, _):
  """The parity of four bits, by an MLP."""
  ones = jnp.ones([16, 1])
  hidden = jnp.tanh(jnp.concatenate([2 * _BITS - 1, ones], axis=1) @ params[0])
  logits = jnp.concatenate([hidden, ones], axis=1) @ params[1]
  return optax.sigmoid_binary_cross_entropy(logits, _BITS.sum(axis=1) % 2).mean()


_SEQUENCES = jnp.asarray(np.random.default_rng(0).integers(0, 2, [10, 64]), jnp.float32)


def _running_start(key):
  keys = jax.random.split(key, 3)
  return [
    _normal(2, 16)(keys[0]),
    _normal(16, 16, scale=0.25)(keys[1]),
    _normal(17, scale=0.25)(keys[2]),
  ]


def _running(params, _):
  """The parity of all bits so far, at each of ten steps, by a recurrent network."""
  inward, across, out = params

  def step(state, bits):
    seen = jnp.stack([2 * bits - 1, jnp.ones(64)], axis=1)
    state = jnp.tanh(seen @ inward + state @ across)
    return state, state @ out[:-1] + out[-1]

  _, logits = jax.lax.scan(step, jnp.zeros([64, 16]), _SEQUENCES)
  parity = jnp.cumsum(_SEQUENCES, axis=0) % 2
  return optax.sigmoid_binary_cross_entropy(logits, parity).mean()


def _rare(gradient, key):
  return gradient * jax.random.bernoulli(key, 0.02, gradient.shape)


def _heavy(gradient, key):
  return gradient + 0.25 * jax.random.t(key, 1.5, gradient.shape)


_square = lambda x, _: (x**2).sum()

PROBLEMS = {
  "ill-conditioned": Small(_normal(20), _bowl(1e6), 3000, 3e-4),
  "Rosenbrock": Small(_near(-1.2, 1.0), _rosenbrock, 3000, 1e-3),
  "Beale": Small(_near(1.0, 1.0), _beale, 2000, 1e-3),
  "saddle": Small(_saddle_start, _saddle, 1000, 1e-2),
  "plateau": Small(_signs(4, 6), lambda x, _: (jnp.tanh(x) ** 2).mean(), 2000, 1e-2),
  "moving target": Small(_normal(20), _moving, 2000, 1e-2),
  "changing scale": Small(_normal(20), _breathing, 2000, 1.0),
  "delayed": Small(_normal(20), _bowl(10), 2000, 1e-2, delay=8),
  "heavy tails": Small(_normal(20), _square, 3000, 0.1, _heavy),
  "sparse": Small(_normal(20), _square, 3000, 1e-3, _rare),
  "scales of layers": Small(_layers_start, _layers, 2000, 1e-3),
  "exploding": Small(_signs(1.5, 2.5), lambda x, _: jnp.expm1(x**2).mean(), 2000, 0.1),
  "kinks": Small(_normal(20), lambda x, _: abs(_TURN @ x).mean(), 1000, 1e-2),
  "parity": Small(_parity_start, _parity, 1000, 1e-2),
  "running parity": Small(_running_start, _running, 1000, 1e-2),
}
