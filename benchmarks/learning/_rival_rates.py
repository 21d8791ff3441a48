"""Schedules and settings of the rivals in the study of learning rates.

`python -m benchmarks.learning._rival_rates` tries the settings of NAdamW again, on all
problems of the study; it knows nothing of this package's optimizers.
"""

from collections.abc import Callable
import itertools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.learning.problems import small
from benchmarks.learning.problems import tasks

# What `calibrate` found: the peak rate, two decays of moments, the decay of weights.
NADAMW = (0.03, 0.9, 0.99, 1e-4)
_GRID = tuple(
  (rate, *decays, weights)
  for rate, decays, weights in itertools.product(
    (3e-3, 1e-2, 3e-2, 1e-1), ((0.9, 0.999), (0.9, 0.99), (0.95, 0.99)), (1e-4, 1e-2)
  )
)
# None of the tables has these.
_SEEDS = (100, 101)


def cosine(rate: Any, steps: int) -> Callable[[Any], jax.Array]:
  """Up to the rate in 5 % of the steps, and down to zero along a cosine."""
  shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 20), steps)
  return lambda step: rate * shape(step)


def nadamw(setting: Any, steps: int) -> Any:
  rate, b1, b2, decay = setting
  return optax.nadamw(cosine(rate, steps), b1=b1, b2=b2, weight_decay=decay)


class AdamHdState(NamedTuple):
  """The state of `adam_hd`."""

  inner: Any
  rate: jax.Array
  direction: Any


def adam_hd(rate: Any, beta: float = 1e-7) -> optax.GradientTransformationExtraArgs:
  """Adam whose rate descends its own gradient (Baydin et al., 2018)."""
  adam = optax.scale_by_adam()

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return AdamHdState(adam.init(params), jnp.asarray(rate), zeros)

  def update(updates, state, params=None, **extra):
    del params, extra
    rate = state.rate + beta * optax.tree.vdot(updates, state.direction)
    direction, inner = adam.update(updates, state.inner)
    updates = jax.tree.map(lambda x: -rate * x, direction)
    return updates, AdamHdState(inner, rate, direction)

  return optax.GradientTransformationExtraArgs(init, update)


def calibrate(quick: bool = False) -> dict[tuple[float, ...], float]:
  """The score of each setting of NAdamW, best first: one half for each kind of problem.

  The share of tasks where it is about as good as the best setting of that task, and
  the share of small problems that it solves from both seeds.
  """
  settings = jnp.array(_GRID)
  tried, solved = [], []
  for spec in tasks.TASKS.values():
    _, values = tasks.train(spec.build(quick, None), nadamw, settings, _SEEDS[:1])
    values = spec.finite(values).mean(axis=1)
    tried.append(spec.good(values, spec.best(values)))
    print(values.round(4).tolist(), tried[-1].sum(), flush=True)
  for problem in small.PROBLEMS.values():
    final = lambda setting, seed, problem=problem: small.final_loss(
      problem, nadamw(setting, problem.steps), seed
    )
    both = jax.vmap(jax.vmap(final, (None, 0)), (0, None))
    losses = np.asarray(jax.jit(both)(settings, jnp.array(_SEEDS)))
    solved.append((losses < problem.threshold).all(axis=1))
    print(losses.max(axis=1).tolist(), solved[-1].sum(), flush=True)
  scores = (np.mean(tried, axis=0) + np.mean(solved, axis=0)) / 2
  found = zip(_GRID, scores.tolist(), strict=True)
  return dict(sorted(found, key=lambda item: -item[1]))


if __name__ == "__main__":
  for setting, score in calibrate().items():
    print(f"{score:.3f}", setting)
