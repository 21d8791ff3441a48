"""Steps 1 and 4 in one backward pass: `python -m benchmarks.speed.fusion`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.speed import _measure
import optax_ranger as ranger

_WIDTHS = (784, 512, 512, 10)


def _problem(size):
  rng = np.random.default_rng(0)
  params = [
    {
      "kernel": jnp.asarray(rng.standard_normal([i, o]) / np.sqrt(i), jnp.float32),
      "bias": jnp.zeros([o]),
    }
    for i, o in itertools.pairwise(_WIDTHS)
  ]
  x = jnp.asarray(rng.standard_normal([size, _WIDTHS[0]]), jnp.float32)
  return params, {"x": x, "y": jnp.asarray(rng.integers(0, _WIDTHS[-1], size))}


def clipping_rows(rounds: int = 8, size: int = 256) -> list[_measure.Row]:
  """The mean of clipped gradients: norms first, or all gradients held."""
  params, batch = _problem(size)
  step = optax.chain(ranger.clip_examples(1.0), ranger.aggregate_by_mean())
  # What the engine does with a step that it is not told of norms.
  held = optax.chain(_untold(ranger.clip_examples(1.0)), ranger.aggregate_by_mean())
  room = 1.5 * 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
  first = ranger.value_and_grad(_losses, step, micro_batch_size=8)
  ours = _measure.stateless(first, params, batch)
  theirs = _measure.stateless(ranger.value_and_grad(_losses, held), params, batch)
  seconds, rival = _measure.measure("clipped, held", [ours, theirs], rounds)
  return [
    _measure.Row(
      f"clip_examples, then a mean, MLP, batch {size}, 8 gradients at a time",
      "all gradients held",
      seconds,
      rival,
      f"1/5 = 0.2, under {room:.3g} MB",
      ours.temporaries,
      theirs.temporaries,
    )
  ]


def _untold(step):
  """Takes no norms from the engine."""
  update = lambda updates, state, params=None, **extra: step.update(
    updates, state, params, **{**extra, "norms": None}
  )
  return optax.GradientTransformationExtraArgs(step.init, update)


def gradient_rows(rounds: int = 60, size: int = 256) -> list[_measure.Row]:
  """The gradient of neighbor averaging and the mean, against the mean alone."""
  params, batch = _problem(size)
  x = batch["x"]
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
  print(_measure.table([*gradient_rows(), *clipping_rows()]))
