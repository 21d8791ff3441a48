"""A physics-informed network: one loss for the equation, one for the border.

The network solves the Helmholtz equation inside a square: a wave that is zero on the
border. The derivatives are large, so the loss of the equation has much larger
gradients. The mean of the two gradients neglects the border, and its solution is worse
than zero everywhere. UPGrad, MGDA and CAGrad treat the losses as conflicting tasks.

One setting for all: Adam with a cosine, 4,000 steps. UPGrad is best. MGDA decides for
the task with the smaller gradient: it fits the border and not the equation.

`python examples/physics.py` takes about five minutes on two cores.
"""

import argparse
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tqdm

import optax_ranger as ranger

AGGREGATORS = {
  "mean": ranger.aggregate_by_mean(),
  "UPGrad": ranger.aggregate_by_upgrad(),
  "MGDA": ranger.aggregate_by_mgda(),
  "CAGrad": ranger.aggregate_by_cagrad(0.5),
}
GRID = jnp.stack(jnp.meshgrid(*[jnp.linspace(-1, 1, 41)] * 2), axis=-1).reshape(-1, 2)


def solution(point: jax.Array) -> jax.Array:
  """Of the Helmholtz equation, zero on the border of the square."""
  return jnp.sin(jnp.pi * point[..., 0]) * jnp.sin(4 * jnp.pi * point[..., 1])


def init(key: jax.Array) -> Any:
  """Kernels and biases of three layers."""
  sizes = (2, 40, 40, 1)
  shapes = zip(jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True)
  return [
    (jax.random.normal(k, [i, o]) / np.sqrt(i), jnp.zeros([o])) for k, i, o in shapes
  ]


def network(params: Any, point: jax.Array) -> jax.Array:
  """The value at a point."""
  x = point[None]
  for kernel, bias in params[:-1]:
    x = jnp.tanh(x @ kernel + bias[None])
  return (x @ params[-1][0] + params[-1][1][None])[0, 0]


def residual(params: Any, point: jax.Array) -> jax.Array:
  """By how much the equation is wrong at a point."""
  value = lambda point: network(params, point)
  along = lambda v: jax.jvp(jax.grad(value), (point,), (v,))[1] @ v
  laplacian = jax.vmap(along)(jnp.eye(2)).sum()
  return laplacian + value(point) - (1 - 17 * jnp.pi**2) * solution(point)


def points(key: jax.Array, inner: int, outer: int) -> tuple[jax.Array, jax.Array]:
  """Random points inside the square, and on its border."""
  keys = jax.random.split(key, 3)
  border = jax.random.uniform(keys[0], [outer, 2], minval=-1, maxval=1)
  # One coordinate of each point moves to a side of the square.
  moves = jax.nn.one_hot(jax.random.randint(keys[1], [outer], 0, 2), 2) > 0
  border = jnp.where(moves, jnp.sign(border), border)
  return jax.random.uniform(keys[2], [inner, 2], minval=-1, maxval=1), border


def losses(params: Any, key: jax.Array) -> jax.Array:
  """One loss for the equation, one for the border."""
  inside, border = points(key, 128, 64)
  equation = jax.vmap(lambda point: residual(params, point))(inside)
  value = jax.vmap(lambda point: network(params, point))(border)
  return jnp.stack([(equation**2).mean(), (value**2).mean()])


def train(aggregator: Any, steps: int, seed: jax.Array) -> Any:
  """The parameters after some steps of Adam."""
  key, start_key = jax.random.split(jax.random.key(seed))
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
  grad_fn = ranger.value_and_grad(losses, aggregator, over="tasks")

  def step(carry, key):
    params, state = carry
    _, gradient = grad_fn(params, key)
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  start = init(start_key), optimizer.init(init(start_key))
  return jax.lax.scan(step, start, jax.random.split(key, steps))[0][0]


@jax.jit
def evaluate(params: Any) -> tuple[jax.Array, jax.Array]:
  """The solution on a grid, and relative errors: equation, border and solution."""
  _, border = points(jax.random.key(0), 1, 1000)
  on = lambda function, at: jax.vmap(lambda point: function(params, point))(at)
  root = lambda values: jnp.sqrt((values**2).mean())
  true, found = solution(GRID), on(network, GRID)
  equation = root(on(residual, GRID)) / (17 * jnp.pi**2 - 1)
  errors = jnp.stack([equation, root(on(network, border)), root(found - true)])
  return found, errors / root(true)


def draw(path: pathlib.Path, found: dict[str, Any]) -> None:
  """The solutions of the first seed, beside the true one."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(1, len(found), figsize=(11, 2.6), layout="constrained")
  for axis, (name, values) in zip(axes, found.items(), strict=True):
    axis.imshow(values.reshape(41, 41), vmin=-1.5, vmax=1.5, cmap="RdBu")
    axis.set(title=name)
  figure.savefig(path, dpi=70)


def main() -> None:
  """Prints the relative errors and draws the solutions."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quick", action="store_true", help="few steps, one seed")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  seeds, steps = (1, 50) if args.quick else (5, 4000)
  drawn, results = {"true": solution(GRID)}, {}
  print("relative errors: equation, border, solution")
  for name in tqdm.tqdm(["mean", "UPGrad"] if args.quick else AGGREGATORS):
    run = jax.jit(jax.vmap(functools.partial(train, AGGREGATORS[name], steps)))
    found, errors = map(np.asarray, jax.vmap(evaluate)(run(jnp.arange(seeds))))
    drawn[name], results[name] = found[0], errors[:, 2].tolist()
    error = errors.std(axis=0) / max(1, seeds - 1) ** 0.5
    tqdm.tqdm.write(f"{name:8}{errors.mean(axis=0).round(3)} ± {error.round(3)}")
  table = {"problem": "Helmholtz equation by a physics-informed network"}
  table |= {"measure": "relative error of the solution", "better": "lower"}
  table |= {"results": results, "baseline": "mean", "ours": "UPGrad"}
  (args.out / "physics.json").write_text(json.dumps(table, indent=1))
  draw(args.out / "physics.png", drawn)


if __name__ == "__main__":
  main()
