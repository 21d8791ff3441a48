"""One training in four loops: Flax NNX, Flax Linen, Equinox and plain JAX.

Half of the labels of digits are missing; each loop passes their number as `weight=` to
`accumulate`. No gain over `MultiSteps`. `python examples/loops.py`: about 2 minutes.
"""

import argparse
import importlib.util
import json
import pathlib
import time

from flax import linen
from flax import nnx
import jax
from matplotlib import figure
import numpy as np
import optax
from sklearn import datasets
import tqdm

import optax_ranger as ranger
from optax_ranger import layers

MLP = linen.Sequential([linen.Dense(256), linen.relu, linen.Dense(10)])
ADAMW = optax.MultiSteps(optax.adamw(1e-3), 4).gradient_transformation()
OPTIMIZERS = {"AdamW": ADAMW, "Ranger": ranger.accumulate(optax.adamw(1e-3), every=4)}


def mean_loss(logits, labels, weights):
  """The weighted mean of the cross-entropy over a micro-batch."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return (weights * losses).sum() / weights.sum()


def flax_nnx(params, tx, batches, test_x):
  """`nnx.Optimizer.update` forwards extra args to the optimizer."""
  rngs, leaves = nnx.Rngs(0), jax.tree.leaves(params)
  hidden, output = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 10, rngs=rngs)
  model = nnx.Sequential(hidden, nnx.relu, output)
  nnx.update(model, jax.tree.unflatten(jax.tree.structure(nnx.state(model)), leaves))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def train_step(model, optimizer, x, y, weights):
    grads = nnx.grad(lambda model: mean_loss(model(x), y, weights))(model)
    optimizer.update(model, grads, weight=weights.sum())

  for batch in batches:
    train_step(model, optimizer, *batch)
  return model(test_x)


def flax_linen(params, tx, batches, test_x):
  """Flax's own `TrainState` drops extra args; the one of `layers` forwards them."""
  state = layers.TrainState.create(apply_fn=MLP.apply, params=params, tx=tx)

  @jax.jit
  def train_step(state, x, y, weights):
    grads = jax.grad(lambda p: mean_loss(MLP.apply(p, x), y, weights))(state.params)
    return state.apply_gradients(grads=grads, weight=weights.sum())

  for batch in batches:
    state = train_step(state, *batch)
  return state.apply_fn(state.params, test_x)


def equinox(params, tx, batches, test_x):
  """The optimizer receives the arrays of the model, without its functions."""
  import equinox as eqx

  leaves = lambda mlp: [x for layer in mlp.layers for x in (layer.bias, layer.weight)]
  model = eqx.nn.MLP(64, 10, 256, depth=1, key=jax.random.key(0))
  model = eqx.tree_at(leaves, model, [leaf.T for leaf in jax.tree.leaves(params)])
  state = tx.init(eqx.filter(model, eqx.is_array))

  @eqx.filter_jit
  def train_step(model, state, x, y, weights):
    loss_fn = lambda model: mean_loss(jax.vmap(model)(x), y, weights)
    grads, arrays = eqx.filter_grad(loss_fn)(model), eqx.filter(model, eqx.is_array)
    updates, state = tx.update(grads, state, arrays, weight=weights.sum())
    return eqx.apply_updates(model, updates), state

  for batch in batches:
    model, state = train_step(model, state, *batch)
  return jax.vmap(model)(test_x)


def plain_jax(params, tx, batches, test_x):
  """Any tree of parameters, and any function of it: here Linen's."""
  state = tx.init(params)

  @jax.jit
  def train_step(params, state, x, y, weights):
    grads = jax.grad(lambda params: mean_loss(MLP.apply(params, x), y, weights))(params)
    updates, state = tx.update(grads, state, params, weight=weights.sum())
    return optax.apply_updates(params, updates), state

  for batch in batches:
    params, state = train_step(params, state, *batch)
  return MLP.apply(params, test_x)


def micro_batches(images, labels, seed, epochs, clock):
  """Yields images, labels and weights, 0 without a label; notes when an epoch ends."""
  rng = np.random.default_rng(seed)
  known = np.asarray(rng.random(1408) < 0.5, np.float32)
  for _ in range(epochs):
    for i in rng.permutation(1408).reshape(-1, 32):
      yield images[i] / 16, labels[i], known[i]
    clock.append(1e3 * time.perf_counter() / 44)


def main() -> None:
  """Trains with each loop and both optimizers, prints a table and draws it."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quick", action="store_true", help="one seed, three epochs")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  seeds, epochs = (1, 3) if args.quick else (5, 40)
  images, labels = map(np.asarray, datasets.load_digits(return_X_y=True))
  loops = [flax_nnx, flax_linen, plain_jax, equinox]
  if not importlib.util.find_spec("equinox"):
    print(f"{loops.pop().__name__} is skipped: it is not installed")
  first, results, ms, gap = {}, {}, {}, 0.0
  runs = [(s, n, loop) for s in range(seeds) for n in OPTIMIZERS for loop in loops]
  for seed, name, loop in tqdm.tqdm(runs):
    clock, params = [], MLP.init(jax.random.key(seed), images)
    batches = micro_batches(images, labels, seed, epochs, clock)
    logits = np.asarray(loop(params, OPTIMIZERS[name], batches, images[1408:] / 16))
    gap = max(gap, float(abs(logits - first.setdefault((seed, name), logits)).max()))
    key, right = f"{name} {loop.__name__}", logits.argmax(axis=1) == labels[1408:]
    results.setdefault(key, []).append(float(right.mean()))
    ms.setdefault(key, []).append(float(np.diff(clock).min()))
  for key, values in results.items():
    error = np.std(values) / max(1, seeds - 1) ** 0.5
    print(f"{key:20}{np.mean(values):.3f} ± {error:.3f}{min(ms[key]):8.2f} ms")
  print(f"largest difference of a logit between loops: {gap:.1e}")
  table = {"problem": "digits", "measure": "accuracy", "results": results, "ms": ms}
  roles = {"better": "higher", "baseline": "AdamW flax_nnx", "ours": "Ranger flax_nnx"}
  (args.out / "loops.json").write_text(json.dumps(table | roles, indent=2))
  axis = (picture := figure.Figure(figsize=(8, 4), layout="constrained")).subplots()
  axis.barh(list(ms), [min(paces) for paces in ms.values()])
  axis.set(xlabel="milliseconds per micro-batch, fastest epoch", ylabel="loop")
  picture.savefig(args.out / "loops.png", dpi=100)


if __name__ == "__main__":
  main()
