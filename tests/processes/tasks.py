"""UPGrad over two tasks, and data that end unevenly, on two processes' devices.

`python -m tests.processes.tasks <port> <process> <devices of each process>...` tells
the parameters after each, and what is said of rows that can't be split.
"""

import json
import os
import sys
from typing import Any

if __name__ == "__main__":
  _MINE = sys.argv[3:][int(sys.argv[2])]
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={_MINE}"

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_ranger as ranger


def losses(params: Any, batch: Any) -> jax.Array:
  """Two tasks on rows of different numbers."""
  hidden = jnp.tanh(batch["inside"] @ params["w"])
  border = batch["border"] @ params["w"]
  return jnp.stack([((hidden - 1) ** 2).mean(), 30 * jnp.abs(border).mean()])


def batches() -> list[dict[str, np.ndarray]]:
  """The rows of all processes."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return [{"inside": normal(16, 5), "border": normal(8, 5)} for _ in range(3)]


def train(
  shard_state: bool, process: int = 0, processes: int = 1, cut: int | None = None
) -> list[list[float]]:
  """The parameters after a step on each batch, with `cut` rows of one leaf."""
  update = ranger.train_step(
    losses,
    optax.sgd(0.1, momentum=0.9),
    step=ranger.aggregate_by_upgrad(),
    over="tasks",
    mesh=jax.make_mesh((jax.device_count(),), ("data",)),
    partition="jit",
    shard_state=shard_state,
  )
  params = {"w": jnp.linspace(-1.0, 1.0, 20).reshape(5, 4)}
  state = update.init(params)
  for batch in batches():
    own = jax.tree.map(lambda rows: np.split(rows, processes)[process], batch)
    own["border"] = own["border"][:cut]
    params, state, _ = update(params, state, own)
  return np.asarray(params["w"].addressable_data(0)).tolist()


# Rows of each process in five calls: the data of the second one end first.
ROWS = [[4, 4, 4, 4, 3], [4, 3, 4, 0, 0]]


def lengths(params: Any, batch: Any) -> jax.Array:
  """Losses without a gradient at rows of zeros."""
  return jnp.linalg.norm(batch @ params["w"], axis=1)


def uneven_calls() -> list[list[tuple[np.ndarray, np.ndarray]]]:
  """Of each process, rows and their weights in each call."""
  rng = np.random.default_rng(0)

  def draw(n):
    rows, weights = rng.standard_normal([n, 5]), rng.uniform(1, 3, n)
    return rows.astype(np.float32), weights.astype(np.float32)

  return [[draw(n) for n in own] for own in ROWS]


def train_to_uneven_ends(
  reduce: str, pad: str, process: int = 0, processes: int = 1
) -> list[list[float]]:
  """The parameters after windows of three calls, of which the end closes the last.

  Args:
    reduce: of `train_step`.
    pad: what a process passes when its data have ended: "nothing", no rows; or
      "weights", rows that it had before with weights of zero.
    process: which one this is.
    processes: how many there are; one alone has the rows of all.
  """
  update = ranger.train_step(
    lengths,
    ranger.accumulate(optax.sgd(0.3, momentum=0.9), 3),
    mesh=jax.make_mesh((jax.device_count(),), ("data",)),
    reduce=reduce,
    batch_size=8,
  )
  params = {"w": jnp.linspace(-1.0, 1.0, 20).reshape(5, 4)}
  state = update.init(params)
  own = uneven_calls()[process]
  if processes == 1:
    join = lambda *parts: tuple(map(np.concatenate, zip(*parts, strict=True)))
    own = [join(*parts) for parts in zip(*uneven_calls(), strict=True)]
  for call, (rows, weights) in enumerate(own):
    if pad == "weights" and not len(rows):
      rows, weights = own[0][0], np.zeros(len(own[0][0]), np.float32)
    params, state, _ = update(
      params, state, rows, member_weights=weights, last=call + 1 == len(own)
    )
  return np.asarray(params["w"].addressable_data(0)).tolist()


WAYS = [(r, p) for r in ("every_call", "on_emission") for p in ("nothing", "weights")]


def main() -> None:
  port, process, *devices = sys.argv[1:]
  jax.distributed.initialize(f"localhost:{port}", len(devices), int(process))
  told: dict[str, Any] = {
    str(shard): train(shard, int(process), len(devices)) for shard in (False, True)
  }
  try:
    train(False, int(process), len(devices), cut=3)
  except Exception as error:
    told["refused"] = str(error)
  told["uneven"] = [
    train_to_uneven_ends(*way, int(process), len(devices)) for way in WAYS
  ]
  print(json.dumps(told))


if __name__ == "__main__":
  main()
