"""The small problems of the study of learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.learning.problems import small


@pytest.mark.parametrize("name", small.PROBLEMS)
def test_nothing_is_solved_at_the_start(name):
  problem = small.PROBLEMS[name]

  @jax.jit
  def start(key):
    params = jax.vmap(problem.setup)(jax.random.split(key, 3))
    return jax.vmap(jax.value_and_grad(problem.loss), (0, None))(params, 0)

  loss, gradient = jax.device_get(start(jax.random.key(0)))
  assert np.isfinite(loss).all()
  assert (loss > problem.threshold).all()
  leaves = jax.tree.leaves(gradient)
  assert all(np.isfinite(leaf).all() for leaf in leaves)
  assert all(leaf.any() for leaf in leaves)
  seen = jax.jit(problem.spoil)(leaves[0], jax.random.key(0))
  assert seen.shape == leaves[0].shape


def test_a_rate_decides_who_passes():
  bowl = small._bowl(10)
  problem = small.Small(small._normal(20), bowl, 200, 1e-3)
  for rate, solved in ((1e-4, False), (0.3, True), (30.0, False)):
    losses = small.final_losses(problem, lambda steps, rate=rate: optax.sgd(rate), 2)
    assert (losses < problem.threshold).tolist() == [solved] * 2


def test_a_gradient_comes_late():
  """Two steps of one that is two steps late are of the first place both."""
  problem = small.Small(
    lambda key: jnp.float32(1), lambda x, _: 0.5 * x**2, 200, 1, delay=2
  )
  for steps, left in ((1, 0.9), (2, 0.8), (3, 0.7), (4, 0.61)):
    short = problem._replace(steps=steps)
    loss = jax.jit(lambda seed, p=short: small.final_loss(p, optax.sgd(0.1), seed))(0)
    # The mean of the last hundredth of steps, of one here, is not empty.
    assert loss == pytest.approx(0.5 * left**2, rel=1e-5)
