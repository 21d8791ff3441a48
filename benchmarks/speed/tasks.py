"""A step over tasks against TorchJD: `python -m benchmarks.speed.tasks`."""

import functools
import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import _measure
import optax_ranger as ranger

_TASKS, _BATCH = 8, 64
_NOT_MEASURED = "not measured: pip install 'torchjd[quadprog_projector]'"


def _problem(width: int, layers: int) -> tuple[Any, Any]:
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(
    rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32
  )
  params = {
    "trunk": [(normal(width, width), jnp.zeros([width])) for _ in range(layers)],
    "heads": normal(width, _TASKS),
  }
  return params, {"x": normal(_BATCH, width), "y": normal(_BATCH, _TASKS)}


def _losses(params: Any, batch: Any) -> jax.Array:
  x = batch["x"]
  for kernel, bias in params["trunk"]:
    x = jax.nn.relu(x @ kernel + bias[None])
  return ((x @ params["heads"] - batch["y"]) ** 2).mean(axis=0)


def step_rows(
  rounds: int = 15, width: int = 1024, layers: int = 4
) -> list[_measure.Row]:
  """UPGrad of eight tasks, forward and backward."""
  params, batch = _problem(width, layers)
  step = ranger.aggregate_by_upgrad()
  rivals = _torchjd(params, batch) if importlib.util.find_spec("torchjd") else {}
  ours = _measure.stateless(
    ranger.value_and_grad(_losses, step, over="tasks"), params, batch
  )
  mean = _measure.stateless(
    jax.value_and_grad(lambda p, b: _losses(p, b).mean()), params, batch
  )
  contenders = [ours, mean, *rivals.values()]
  own, of_mean, *others = _measure.measure("UPGrad, 8 tasks", contenders, rounds)
  what = f"UPGrad of {_TASKS} tasks, {_measure.millions(params)}, batch {_BATCH}"
  row = functools.partial(_measure.Row, what)
  rows = [row("the mean loss", own, of_mean, "-", ours.temporaries, mean.temporaries)]
  if not rivals:
    empty = np.array([])
    return [*rows, row(_NOT_MEASURED, empty, empty, "1.3")]
  of = dict(zip(rivals, others, strict=True))
  fastest = min(rivals, key=lambda name: np.median(of[name]))
  reach = lambda name: "1.3" if name == fastest else "-"
  return rows + [
    row(name, own, times, reach(name), ours.temporaries) for name, times in of.items()
  ]


def _torchjd(params: Any, batch: Any) -> dict[str, _measure.Contender]:
  """Its engines: Jacobians of the trunk, of everything, and the Gramian."""
  modules = ("torch", "torchjd.aggregation", "torchjd.autogram", "torchjd.autojac")
  torch, aggregation, autogram, autojac = map(importlib.import_module, modules)
  torch.set_num_threads(_measure.cores())  # which is what XLA takes
  tensor = lambda leaf: torch.tensor(np.array(leaf))

  def network():
    layers = []
    for kernel, bias in params["trunk"]:
      layer = torch.nn.Linear(*kernel.shape)
      layer.weight.data, layer.bias.data = tensor(kernel.T), tensor(bias)
      layers += [layer, torch.nn.ReLU()]
    trunk = torch.nn.Sequential(*layers)
    heads = torch.nn.Linear(*params["heads"].shape, bias=False)
    heads.weight.data = tensor(params["heads"].T)
    return torch.nn.Sequential(trunk, heads)

  x, y = tensor(batch["x"]), tensor(batch["y"])
  aggregator, weighting = aggregation.UPGrad(), aggregation.UPGradWeighting()
  # The engine leaves hooks in its model.
  plain, hooked = network(), network()
  engine = autogram.Engine(hooked, batch_dim=None)

  def losses(model):
    model.zero_grad()
    return ((model(x) - y) ** 2).mean(dim=0)

  def jacobian():
    autojac.backward(losses(plain))
    autojac.jac_to_grad(plain.parameters(), aggregator)
    return plain[1].weight.grad

  def gramian():
    values = losses(hooked)
    values.backward(weighting(engine.compute_gramian(values)))
    return hooked[1].weight.grad

  return {
    "TorchJD, autojac": _measure.Contender(jacobian, 0),
    "TorchJD, autogram": _measure.Contender(gramian, 0),
  }


if __name__ == "__main__":
  print(_measure.machine())
  print(_measure.table(step_rows()))
