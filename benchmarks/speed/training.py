"""Training steps on a mesh, and what they send: `python -m benchmarks.speed.training`.

Eight devices: accelerators where there are eight, else eight simulated on the CPU.
"""

import os

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from benchmarks.speed import _measure
import optax_ranger as ranger

_CLASSES, _EXAMPLES, _K = 10, 60_000, 10
_SIZES = (784, 512, 512, _CLASSES)


def _start() -> list[dict[str, jax.Array]]:
  rng = np.random.default_rng(0)
  return [
    {
      "kernel": jnp.asarray(rng.standard_normal([i, o]) / np.sqrt(i), jnp.float32),
      "bias": jnp.zeros([o]),
    }
    for i, o in itertools.pairwise(_SIZES)
  ]


def _batch(size: int) -> tuple[dict[str, np.ndarray], np.ndarray, ranger.Neighbors]:
  rng = np.random.default_rng(1)
  images = rng.standard_normal([size, _SIZES[0]]).astype(np.float32)
  labels = rng.integers(0, _CLASSES, size)
  neighbors = ranger.neighbors.nearest(images, _K)
  neighbors = ranger.neighbors.weigh(neighbors, labels=labels)
  ids = rng.permutation(_EXAMPLES)[:size].astype(np.int32)
  return {"image": images, "label": labels}, ids, neighbors


def _logits(params: Any, x: jax.Array) -> jax.Array:
  for layer in params[:-1]:
    x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
  return x @ params[-1]["kernel"] + params[-1]["bias"]


def _losses(params: Any, batch: Any) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(
    _logits(params, batch["image"]), batch["label"]
  )


def _regularized(params: Any, batch: Any, smoothed: jax.Array) -> tuple[Any, Any]:
  logits = _logits(params, batch["image"])
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
  losses += 3 * ranger.labels.early_learning_regularizer(logits, smoothed)
  return losses, {"predictions": jax.nn.softmax(logits)}


def _whole_ranger(
  mesh: Any, every: int = 1, **options: Any
) -> ranger.training.TrainStep:
  tx = ranger.ranger(
    0.1,
    every=every,
    ema_decay=0.99,
    num_examples=_EXAMPLES,
    num_classes=_CLASSES,
  )
  head = ranger.ranger_head()
  return ranger.train_step(
    _regularized, tx, step=head, has_aux=True, mesh=mesh, **options
  )


def _by_hand(mesh: Any, tx: Any) -> Any:
  """What people write: the mean over devices, then the optimizer on each."""

  def step(params, state, batch):
    apart = jax.lax.pcast(params, "data", to="varying")
    loss, grads = jax.value_and_grad(lambda p: _losses(p, batch).mean())(apart)
    loss, grads = jax.lax.pmean((loss, grads), "data")
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  whole, rows = PartitionSpec(), PartitionSpec("data")
  return jax.jit(
    jax.shard_map(
      step, mesh=mesh, in_specs=(whole, whole, rows), out_specs=(whole, whole, whole)
    ),
    donate_argnums=(0, 1),
  )


def _contender(call: Any, lower: Any, params: Any, state: Any, args: Any, extra: Any):
  kept = params, state
  compiled = lower(*kept, *args, **extra).compile()

  def turn():
    nonlocal kept
    *kept, _ = call(*kept, *args, **extra)
    return kept

  return _measure.Contender(turn, _measure.temporaries(compiled))


def rows_of_time(mesh: Any, size: int, rounds: int = 20) -> list[_measure.Row]:
  """The whole Ranger, and AdamW by train_step, against AdamW by hand."""
  split = NamedSharding(mesh, PartitionSpec("data"))
  batch, ids, neighbors = jax.device_put(_batch(size), split)
  whole = lambda tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
  adamw = optax.adamw(1e-3)
  hand = _by_hand(mesh, adamw)
  ours = ranger.train_step(_losses, adamw, mesh=mesh)
  recipe = _whole_ranger(mesh)
  extra = {"neighbors": neighbors, "example_ids": ids}
  start = whole(_start())
  moments = whole(adamw.init(start))
  contenders = [
    _contender(recipe, recipe.lower, start, recipe.init(start), (batch,), extra),
    _contender(ours, ours.lower, whole(_start()), ours.init(start), (batch,), {}),
    _contender(hand, hand.lower, whole(_start()), moments, (batch,), {}),
  ]
  *seconds, rival = _measure.measure("training steps", contenders, rounds)
  what = ("the whole Ranger", "AdamW by train_step")
  return [
    _measure.Row(
      f"{name}, MLP, batch {size}, {mesh.size} devices",
      "AdamW, data-parallel, by hand",
      own,
      rival,
      reach,
      contender.temporaries,
      contenders[-1].temporaries,
    )
    for name, own, contender, reach in zip(
      what, seconds, contenders, ("1.15", "-"), strict=False
    )
  ]


def all_reduce_rows(
  num_micro_batches: int = 16, size: int = 1024
) -> list[_measure.Row]:
  """Gradient-sized reductions of an optimizer step, counted in the program."""
  mesh, m = _mesh(8), num_micro_batches
  batch, ids, neighbors = _batch(size)
  part = jax.tree.map(lambda leaf: leaf[: size // m], batch)
  tx = optax.MultiSteps(optax.adamw(1e-3), m)
  hand = _by_hand(mesh, tx).lower(_start(), tx.init(_start()), part)
  theirs = m * sum(_sent(hand)[0].values())
  extra = {"neighbors": neighbors, "example_ids": ids}
  rows = []
  ways: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("in one call", 1, {"num_micro_batches": m}),
    ("in calls of their own", m, {"every": m, "reduce": "on_emission"}),
  )
  for way, calls, options in ways:
    update, params = _whole_ranger(mesh, **options), _start()
    sent, _ = _sent(update.lower(params, update.init(params), batch, **extra))
    ours = sum(
      times * (1 if conditional else calls) for (_, conditional), times in sent.items()
    )
    rows.append(
      _measure.Row(
        f"gradients sent in an optimizer step, the whole Ranger, {m} micro-batches"
        f" {way}, {mesh.size} devices: {ours:.3g}",
        f"optax.MultiSteps, data-parallel, by hand: {theirs:.3g}",
        np.array([ours]),
        np.array([theirs]),
        f"1/{m} = {1 / m:.3g}",
        timed=False,
      )
    )
  return rows


def _sent(step: Any) -> tuple[dict[tuple[str, bool], float], int]:
  """What a call sends.

  Returns:
    How often as much as the gradient, by kind and whether that is conditional, and
    the bytes of all else.
  """
  gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(_start()))
  counted: dict[tuple[str, bool], float] = {}
  rest = 0
  for one in ranger.training.collectives(step):
    if one.num_bytes > gradient // 16:
      key = one.kind, one.conditional > 0
      counted[key] = counted.get(key, 0) + one.num_bytes * one.count / gradient
    else:
      rest += one.num_bytes * one.count
  return counted, rest


def table_of_bytes(mesh: Any, size: int = 1024) -> str:
  """What one call sends, in gradients and in all else, for each way."""
  batch, ids, neighbors = _batch(size)
  extra = {"neighbors": neighbors, "example_ids": ids}
  adamw = optax.adamw(1e-3)
  state = adamw.init(_start())
  lines = [
    "| step | gradient-sized, times the parameters | all else, kB |",
    "| --- | --- | --- |",
  ]

  def add(name: str, lowered: Any) -> None:
    counted, rest = _sent(lowered)
    listed = "; ".join(
      f"{times:.2f} {kind}" + (", on emission only" if conditional else "")
      for (kind, conditional), times in counted.items()
    )
    lines.append(f"| {name} | {listed or 'none'} | {rest / 1e3:.1f} |")

  add("AdamW by hand", _by_hand(mesh, adamw).lower(_start(), state, batch))
  ways: dict[str, dict[str, Any]] = {
    f"the whole Ranger, {m} micro-batches": {"num_micro_batches": m} for m in (1, 4, 16)
  }
  ways["... with shard_state"] = {"num_micro_batches": 4, "shard_state": True}
  ways["... with reduce on emission"] = {"every": 4, "reduce": "on_emission"}
  explicit = _mesh(mesh.size, AxisType.Explicit)
  for m in (1, 4, 16):
    options = {"num_micro_batches": m, "partition": "jit"}
    ways[f'... with partition="jit", explicit mesh, {m} micro-batches'] = {
      "mesh": explicit,
      **options,
    }
    ways[f'... with partition="jit", automatic mesh, {m} micro-batches'] = options
  for name, options in ways.items():
    update = _whole_ranger(**{"mesh": mesh, **options})
    params = _start()
    add(name, update.lower(params, update.init(params), batch, **extra))
  return "\n".join(lines)


def _mesh(count: int, kind: AxisType = AxisType.Auto) -> Any:
  devices = jax.devices()[:count]
  return jax.make_mesh((count,), ("data",), (kind,), devices=devices)


def main() -> None:
  """Prints both tables."""
  print(_measure.machine())
  rows = [
    row
    for count, size in ((2, 1024), (2, 4096), (8, 1024), (8, 4096))
    for row in rows_of_time(_mesh(count), size)
  ]
  print(_measure.table(rows))
  print(table_of_bytes(_mesh(8)))


if __name__ == "__main__":
  main()
