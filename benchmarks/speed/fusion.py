"""Steps 1 and 4 in one backward pass: `python -m benchmarks.speed.fusion`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.speed import _measure
import optax_ranger as ranger

_WIDTHS = (784, 512, 512, 10)


def gradient_rows(rounds: int = 60, size: int = 256) -> list[_measure.Row]:
  """The gradient of neighbor averaging and the mean, against the mean alone."""
  rng = np.random.default_rng(0)
  params = [
    {
      "kernel": jnp.asarray(rng.standard_normal([i, o]) / np.sqrt(i), jnp.float32),
      "bias": jnp.zeros([o]),
    }
    for i, o in itertools.pairwise(_WIDTHS)
  ]
  x = jnp.asarray(rng.standard_normal([size, _WIDTHS[0]]), jnp.float32)
  batch = {"x": x, "y": jnp.asarray(rng.integers(0, _WIDTHS[-1], size))}
  neighbors = ranger.neighbors.weigh(ranger.neighbors.nearest(x, 10), labels=batch["y"])
  head = ranger.ranger_head()
  fused = ranger.value_and_grad(_losses, head)

  def plain(params, batch):
    def mean_loss(params):
      losses = _losses(params, batch)
      return losses.mean(), losses

    (_, losses), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return losses, gradient

  def per_example(params, batch, neighbors):
    def one(params, row):
      return _losses(params, jax.tree.map(lambda leaf: leaf[None], row))[0]

    losses, gradients = jax.vmap(jax.value_and_grad(one), (None, 0))(params, batch)
    state = head.init(params)
    return losses, head.update(gradients, state, params, neighbors=neighbors)[0]

  ours = _measure.stateless(
    lambda params, batch, neighbors: fused(params, batch, neighbors=neighbors),
    params,
    batch,
    neighbors,
  )
  mean = _measure.stateless(plain, params, batch)
  apart = _measure.stateless(per_example, params, batch, neighbors)
  pair = _measure.measure("fused, plain mean", [ours, mean], rounds, calls=5)
  slow = _measure.measure(
    "per-example, plain mean", [apart, mean], max(1, rounds // 10)
  )
  what = f"neighbor-averaged gradient, MLP, batch {size}, "
  return [
    _measure.Row(
      what + form,
      "plain mean",
      seconds,
      rival,
      reach,
      contender.temporaries,
      mean.temporaries,
    )
    for form, contender, (seconds, rival), reach in (
      ("fused", ours, pair, "1.05"),
      ("per-example", apart, slow, "-"),
    )
  ]


def _losses(params, batch):
  x = batch["x"]
  for layer in params[:-1]:
    x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
  logits = x @ params[-1]["kernel"] + params[-1]["bias"][None]
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


if __name__ == "__main__":
  print(_measure.machine())
  print(_measure.table(gradient_rows()))
