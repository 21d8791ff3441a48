"""Two tasks on one network whose gradients conflict.

One network says the class of a digit, and draws the image again. The loss of the
second task is ten times as large as it would be by itself, so the mean of the two
gradients neglects the first. The program trains with this mean and with aggregators
for conflicting tasks: UPGrad, MGDA and CAGrad.

One setting for all: Adam with a cosine. CAGrad gains accuracy and draws the images as
well as the mean does. MGDA neglects the images, and UPGrad gains nothing here.
`examples/physics.py` has a problem where UPGrad is best.

`python examples/conflicting_tasks.py` takes about two minutes on two cores.
"""

import argparse
from collections.abc import Callable
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
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


def train(
  losses: Callable[..., jax.Array],
  aggregator: Any,
  optimizer: optax.GradientTransformation,
  params: Any,
  inputs: Any,
) -> Any:
  """The parameters after a step on each of the inputs."""
  grad_fn = ranger.value_and_grad(losses, aggregator, over="tasks")

  def step(carry, batch):
    params, state = carry
    _, gradient = grad_fn(params, batch)
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), inputs)
  return params


def layers(sizes: tuple[int, ...], key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
  """Kernels and biases of dense layers."""
  keys = jax.random.split(key, len(sizes) - 1)
  shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
  return [
    (jax.random.normal(k, [i, o]) / np.sqrt(i), jnp.zeros([o])) for k, i, o in shapes
  ]


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
  params = jax.jit(lambda p: train(losses, aggregator, optimizer, p, inputs))(params)
  logits, image = outputs(params, test_x)
  variance = ((test_x - test_x.mean(axis=0)[None]) ** 2).sum()
  drawn = 1 - ((image - test_x) ** 2).sum() / variance
  return float((logits.argmax(axis=1) == test_y).mean()), float(drawn)


def mean_of(figures: np.ndarray) -> str:
  """The mean and its standard error, in words."""
  error = figures.std() / max(1, len(figures) - 1) ** 0.5
  return f"{figures.mean():.3f} ± {error:.3f}"


def draw(path: pathlib.Path, found: dict[str, np.ndarray]) -> None:
  """Both tasks of each run."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  _, axis = plt.subplots(figsize=(6, 4), layout="constrained")
  for name, values in found.items():
    axis.scatter(*values.T, label=name)
  axis.set(xlabel="test accuracy", ylabel="share of the variance drawn again")
  axis.legend()
  plt.savefig(path, dpi=90)


def main() -> None:
  """Trains, prints the table and draws the picture."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quick", action="store_true", help="few steps, one seed")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  seeds, steps = (1, 50) if args.quick else (5, 1500)
  found = {}
  for name in tqdm.tqdm(["mean", "CAGrad"] if args.quick else AGGREGATORS):
    runs = [digits(AGGREGATORS[name], seed, steps) for seed in range(seeds)]
    found[name] = np.array(runs)
  print(f"{'':8}{'test accuracy':>16}{'variance drawn':>16}")
  for name, values in found.items():
    print(f"{name:8}{mean_of(values[:, 0]):>16}{mean_of(values[:, 1]):>16}")
  table = {
    "problem": "digits: classes and images by one network, unequal losses",
    "measure": "test accuracy",
    "better": "higher",
    "results": {name: values[:, 0].tolist() for name, values in found.items()},
    "baseline": "mean",
    "ours": "CAGrad",
    "variance drawn": {name: values[:, 1].tolist() for name, values in found.items()},
  }
  (args.out / "conflicting_tasks.json").write_text(json.dumps(table, indent=1))
  draw(args.out / "conflicting_tasks.png", found)


if __name__ == "__main__":
  main()
