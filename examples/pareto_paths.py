"""Paths of two conflicting losses to their Pareto set.

Two functions of two variables ([Liu et al., 2021](https://arxiv.org/abs/2110.14048),
figure 1). At a point of the Pareto set no direction improves both. The program starts
at five points, follows the mean of the two gradients, UPGrad, MGDA and CAGrad, and
counts which of them arrive. The mean stops in a valley of one function from two starts.

`python examples/pareto_paths.py` takes about two minutes on two cores.
"""

import argparse
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
STARTS = ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))


def two_functions(point: jax.Array, _: Any) -> jax.Array:
  """The two losses of a point in the plane."""
  x, y = point
  log = lambda z: jnp.log(jnp.maximum(jnp.abs(z), 5e-6)) + 6
  bowl = lambda shift: ((-x + shift) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
  above, below = jnp.maximum(jnp.tanh(0.5 * y), 0), jnp.maximum(jnp.tanh(-0.5 * y), 0)
  first = above * log(0.5 * (-x - 7) - jnp.tanh(-y)) + below * bowl(7)
  second = above * log(0.5 * (-x + 3) - jnp.tanh(-y) + 2) + below * bowl(-7)
  return jnp.stack([first, second])


def paths(aggregator: Any, steps: int) -> np.ndarray:
  """Points on the way [starts, 100, 2]."""

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
    return points

  optimizer = optax.adam(100 / steps)
  grad_fn = ranger.value_and_grad(two_functions, aggregator, over="tasks")
  return np.asarray(jax.jit(jax.vmap(one))(jnp.array(STARTS)))


def draw(path: pathlib.Path, found: dict[str, np.ndarray]) -> None:
  """The ways from all starts, over the mean of the two functions."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

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
  figure.savefig(path, dpi=60)


def main() -> None:
  """Follows the gradients, prints who arrives and draws the paths."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quick", action="store_true", help="few steps")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  found, results = {}, {}
  for name in tqdm.tqdm(["mean", "UPGrad"] if args.quick else AGGREGATORS):
    found[name] = paths(AGGREGATORS[name], 300 if args.quick else 30_000)
    results[name] = (np.abs(found[name][:, -1, 1] + 8) < 1).astype(float).tolist()
    tqdm.tqdm.write(f"{name:8}{sum(results[name]):.0f} of {len(STARTS)} starts arrive")
  table = {
    "problem": "two functions of two variables",
    "measure": "share of five starts that reach the Pareto set",
    "better": "higher",
    "results": results,
    "baseline": "mean",
    "ours": "UPGrad",
  }
  (args.out / "pareto_paths.json").write_text(json.dumps(table, indent=1))
  draw(args.out / "pareto_paths.png", found)


if __name__ == "__main__":
  main()
