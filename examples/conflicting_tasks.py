"""Two tasks on one network whose gradients conflict.

`python examples/conflicting_tasks.py` trains three problems with the mean of the
tasks' gradients, UPGrad, MGDA and CAGrad, prints a table, and draws the paths of the
first one; some five minutes on two cores, less with `--quick`.

- Two functions of two variables (Liu et al., 2021, figure 1), from five starts.
- Digits: one network says the class, and draws the image again; the second loss is
  ten times as large as it would be by itself.
- A physics-informed network: the Helmholtz equation inside of a square, where the
  derivatives are large, and zero on its border.
"""

import argparse
from collections.abc import Callable
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
import tqdm

import optax_ranger as ranger

AGGREGATORS = {
  "mean": ranger.aggregate_by_mean(),
  "UPGrad": ranger.aggregate_by_upgrad(),
  "MGDA": ranger.aggregate_by_mgda(),
  "CAGrad": ranger.aggregate_by_cagrad(0.5),
}
STARTS = ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))


def train(
  losses: Callable[..., jax.Array],
  aggregator: Any,
  optimizer: optax.GradientTransformation,
  params: Any,
  inputs: Any,
) -> tuple[Any, jax.Array]:
  """The parameters after a step on each of the inputs, and the losses on the way."""
  grad_fn = ranger.value_and_grad(losses, aggregator, over="tasks")

  def step(carry, batch):
    params, state = carry
    values, gradient = grad_fn(params, batch)
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), values

  (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), inputs)
  return params, values


def layers(sizes: tuple[int, ...], key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
  """Kernels and biases of dense layers."""
  keys = jax.random.split(key, len(sizes) - 1)
  shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
  return [
    (jax.random.normal(k, [i, o]) / np.sqrt(i), jnp.zeros([o])) for k, i, o in shapes
  ]


def two_functions(point: jax.Array, _: Any) -> jax.Array:
  """The two losses of a point in the plane."""
  x, y = point
  log = lambda z: jnp.log(jnp.maximum(jnp.abs(z), 5e-6)) + 6
  bowl = lambda shift: ((-x + shift) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
  above, below = jnp.maximum(jnp.tanh(0.5 * y), 0), jnp.maximum(jnp.tanh(-0.5 * y), 0)
  first = above * log(0.5 * (-x - 7) - jnp.tanh(-y)) + below * bowl(7)
  second = above * log(0.5 * (-x + 3) - jnp.tanh(-y) + 2) + below * bowl(-7)
  return jnp.stack([first, second])


def paths(aggregator: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
  """Points on the way [starts, 100, 2], and the losses at the end [starts, 2]."""

  def one(start):
    def piece(carry, _):
      point, state = carry
      point, state = jax.lax.fori_loop(0, steps // 100, move, (point, state))
      return (point, state), point

    def move(_, carry):
      point, state = carry
      _, gradient = grad_fn(point, None)
      updates, state = optimizer.update(gradient, state)
      return optax.apply_updates(point, updates), state

    _, points = jax.lax.scan(piece, (start, optimizer.init(start)), None, length=100)
    return points, two_functions(points[-1], None)

  optimizer = optax.adam(100 / steps)
  grad_fn = ranger.value_and_grad(two_functions, aggregator, over="tasks")
  points, losses = jax.jit(jax.vmap(one))(jnp.array(STARTS))
  return np.asarray(points), np.asarray(losses)


def digits(aggregator: Any, seed: int, steps: int) -> tuple[float, float]:
  """The test accuracy, and the share of the images' variance that is drawn again."""
  x, y = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(seed).permutation(len(y))
  x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
  rows, (test_x, test_y) = 1200, (x[1200:], y[1200:])
  keys = jax.random.split(jax.random.key(seed), 4)
  params = {
    "trunk": layers((64, 64, 16), keys[0]),
    "class": layers((16, 10), keys[1]),
    "image": layers((16, 64), keys[2]),
  }

  def outputs(params, x):
    for kernel, bias in params["trunk"]:
      x = jax.nn.relu(x @ kernel + bias[None])
    heads = ((params[name][0]) for name in ("class", "image"))
    return [x @ kernel + bias[None] for kernel, bias in heads]

  def losses(params, ids):
    logits, image = outputs(params, x[ids])
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y[ids])
    squares = ((image - x[ids]) ** 2).sum(axis=1)
    return jnp.stack([entropy.mean(), 10 * squares.mean()])

  inputs = jax.random.randint(keys[3], [steps, 64], 0, rows)
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
  params, _ = jax.jit(lambda p: train(losses, aggregator, optimizer, p, inputs))(params)
  logits, image = outputs(params, test_x)
  variance = ((test_x - test_x.mean(axis=0)[None]) ** 2).sum()
  drawn = 1 - ((image - test_x) ** 2).sum() / variance
  return float((logits.argmax(axis=1) == test_y).mean()), float(drawn)


def solution(point: jax.Array) -> jax.Array:
  """Of the Helmholtz equation, zero on the border of the square."""
  return jnp.sin(jnp.pi * point[..., 0]) * jnp.sin(4 * jnp.pi * point[..., 1])


def helmholtz(aggregator: Any, seed: int, steps: int) -> tuple[float, float, float]:
  """Relative errors: of the equation, on the border, and of the solution."""
  keys = jax.random.split(jax.random.key(seed), 2)
  params = layers((2, 40, 40, 1), keys[0])

  def network(params, point):
    x = point[None]
    for kernel, bias in params[:-1]:
      x = jnp.tanh(x @ kernel + bias[None])
    return (x @ params[-1][0] + params[-1][1][None])[0, 0]

  def residual(params, point):
    value = lambda point: network(params, point)
    along = lambda v: jax.jvp(jax.grad(value), (point,), (v,))[1] @ v
    laplacian = along(jnp.array([1.0, 0.0])) + along(jnp.array([0.0, 1.0]))
    source = (1 - 17 * jnp.pi**2) * solution(point)
    return laplacian + value(point) - source

  def losses(params, key):
    inside, border = points(key, 128, 64)
    equation = jax.vmap(lambda point: residual(params, point))(inside)
    value = jax.vmap(lambda point: network(params, point))(border)
    return jnp.stack([(equation**2).mean(), (value**2).mean()])

  def points(key, inner, outer):
    keys = jax.random.split(key, 4)
    place = jax.random.uniform(keys[0], [outer], minval=-1, maxval=1)
    side = jnp.where(jax.random.bernoulli(keys[1], shape=[outer]), 1.0, -1.0)
    upright = jax.random.bernoulli(keys[2], shape=[outer, 1])
    border = jnp.where(
      upright, jnp.stack([side, place], axis=1), jnp.stack([place, side], axis=1)
    )
    return jax.random.uniform(keys[3], [inner, 2], minval=-1, maxval=1), border

  inputs = jax.random.split(keys[1], steps)
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
  params, _ = jax.jit(lambda p: train(losses, aggregator, optimizer, p, inputs))(params)
  ticks = jnp.linspace(-1, 1, 41)
  grid = jnp.stack(jnp.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
  _, border = points(jax.random.key(0), 1, 1000)
  on = lambda function, at: np.asarray(jax.vmap(lambda x: function(params, x))(at))
  size = np.sqrt((np.asarray(solution(grid)) ** 2).mean())
  root = lambda values: float(np.sqrt((values**2).mean()))
  source = (17 * np.pi**2 - 1) * size
  error = on(network, grid) - np.asarray(solution(grid))
  return (
    root(on(residual, grid)) / source,
    root(on(network, border)) / size,
    root(error) / size,
  )


def mean_of(figures: np.ndarray) -> str:
  """The mean and its standard error, in words."""
  error = figures.std(ddof=1) / np.sqrt(len(figures)) if len(figures) > 1 else 0
  return f"{figures.mean():.3f} ± {error:.3f}"


def draw(path: pathlib.Path, found: dict[str, np.ndarray]) -> None:
  """The ways from all starts, over the mean of the two functions."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 4), sharey=True)
  ticks = np.linspace(-10, 10, 200, dtype=np.float32)
  grid = np.stack(np.meshgrid(ticks, ticks), axis=-1)
  heights = jax.vmap(jax.vmap(lambda p: two_functions(p, None).mean()))(grid)
  for axis, (name, points) in zip(axes, found.items(), strict=True):
    axis.contour(ticks, ticks, heights, levels=20, linewidths=0.5, cmap="viridis")
    axis.plot([-7, 7], [-8, -8], color="0.6", linewidth=5, label="Pareto set")
    for start, way in zip(STARTS, points, strict=True):
      way = np.concatenate([[start], way])
      axis.plot(*way.T, color="tab:red", linewidth=1)
      axis.plot(*start, "ko", markersize=4)
      axis.plot(*way[-1], "*", color="tab:red", markersize=12)
    axis.set(title=name, xlim=(-10, 10), ylim=(-10, 10))
  axes[0].legend(loc="upper left")
  figure.tight_layout()
  figure.savefig(path, dpi=90)
  plt.close(figure)


def main() -> None:
  """Trains, prints the table and draws the picture."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quick", action="store_true", help="few steps, one seed")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  seeds, share = (1, 100) if args.quick else (5, 1)
  rows, ways = [], {}
  for name, aggregator in tqdm.tqdm(AGGREGATORS.items()):
    ways[name], ends = paths(aggregator, 30_000 // share)
    images = np.array([digits(aggregator, s, 1500 // share) for s in range(seeds)])
    waves = np.array([helmholtz(aggregator, s, 4000 // share) for s in range(seeds)])
    there = int((np.abs(ways[name][:, -1, 1] + 8) < 1).sum())
    rows.append((name, f"{there} of {len(ends)}", images, waves))
  print(
    f"{'':8}{'at the Pareto set':>18}{'digits: accuracy':>18}{'variance drawn':>16}"
    f"{'Helmholtz: equation':>21}{'border':>16}{'solution':>16}"
  )
  for name, there, images, waves in rows:
    cells = [mean_of(column) for column in (*images.T, *waves.T)]
    print(
      f"{name:8}{there:>18}{cells[0]:>18}{cells[1]:>16}"
      f"{cells[2]:>21}{cells[3]:>16}{cells[4]:>16}"
    )
  draw(args.out / "conflicting_tasks.png", ways)
  print(f"picture: {args.out / 'conflicting_tasks.png'}")


if __name__ == "__main__":
  main()
