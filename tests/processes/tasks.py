"""UPGrad over two tasks, on the devices of two processes.

`python -m tests.processes.tasks <port> <process> <devices of each process>...` tells
the parameters after three steps, and what is said of rows that can't be split.
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
  print(json.dumps(told))


if __name__ == "__main__":
  main()
