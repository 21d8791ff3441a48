"""Step 5 and the other Ranger, measured: `python -m benchmarks.speed.smoothing`."""

import importlib
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.speed import _measure
import optax_ranger as ranger

_EVERY = 6
_PYTORCH = "pytorch_optimizer.Ranger"


def lookahead_rows(rounds: int = 10, width: int = 2048) -> list[_measure.Row]:
  """Lookahead over radam: the mean over windows of six steps."""
  params, gradients = _measure.normal(0, width=width), _measure.normal(1, width=width)
  radam = optax.radam(1e-3)
  ours = _measure.training(
    optax.chain(radam, ranger.smooth_by_lookahead(_EVERY)), params, gradients
  )
  alone = _measure.training(radam, params, gradients)
  theirs = _lookahead_pair(radam, params, gradients)
  found = []
  # One at a time: the buffers that Optax's takes and gives back slow down its
  # neighbors in a round.
  for name, other, reach in (
    ("optax.radam alone", alone, "1.15"),
    ("optax.lookahead over optax.radam", theirs, "-"),
  ):
    seconds, rival = _measure.measure(name, [ours, other], rounds, calls=_EVERY)
    found.append(
      _measure.Row(
        f"smooth_by_lookahead over optax.radam, {_measure.millions(params)}",
        name,
        seconds,
        rival,
        reach,
        ours.temporaries,
        other.temporaries,
      )
    )
  return [*found, *_momentum_rows(ours, params, gradients, rounds)]


def _momentum_rows(without, params, gradients, rounds) -> list[_measure.Row]:
  """What outer momentum adds to lookahead, against one more buffer."""
  smoothing = ranger.smooth_by_lookahead(_EVERY, momentum=0.5)
  tx = optax.chain(optax.radam(1e-3), smoothing)
  ours = _measure.training(tx, params, gradients)
  copying = _measure.copying(sum(leaf.size for leaf in params))
  contenders = [ours, without, copying]
  whole, base, copy = _measure.measure("momentum", contenders, rounds, calls=_EVERY)
  row = _measure.Row(
    f"smooth_by_lookahead with momentum 0.5, {_measure.millions(params)}",
    "smooth_by_lookahead without, over optax.radam both",
    whole,
    base,
    "-",
    ours.temporaries,
    without.temporaries,
  )
  # The velocity read and written is one copy's worth.
  added = row._replace(
    what=f"what momentum adds to smooth_by_lookahead, {_measure.millions(params)}",
    rival="bandwidth floor",
    samples=whole - base,
    rival_samples=copy,
    reach="1",
    rival_temporaries=None,
  )
  return [row, added]


def _lookahead_pair(fast, params, gradients) -> _measure.Contender:
  """Optax's lookahead, which wants a pair of parameters."""
  tx = optax.lookahead(fast, _EVERY, 0.5)
  # Not init_synced, whose two halves share buffers: they can't be donated.
  pair = optax.LookaheadParams(params, jax.tree.map(jnp.copy, params))

  def step(pair, state, gradients):
    updates, state = tx.update(gradients, state, pair)
    return optax.apply_updates(pair, updates), state

  return _measure.looping(step, pair, tx.init(pair), gradients)


def ema_rows(rounds: int = 20, width: int = 2048) -> list[_measure.Row]:
  """What an EMA adds to SGD, against the bandwidth that it can't do without."""
  params, gradients = _measure.normal(0, width=width), _measure.normal(1, width=width)
  sgd = optax.sgd(1e-3)
  ours = _measure.training(
    optax.chain(sgd, ranger.smooth_by_ema(0.999)), params, gradients
  )
  alone = _measure.training(sgd, params, gradients)
  size = sum(leaf.size for leaf in params)
  whole, base, copy = _measure.measure(
    "smooth_by_ema", [ours, alone, _measure.copying(size)], rounds
  )
  # Parameters and updates read, the copy read and written: two copies' worth.
  return [
    _measure.Row(
      f"what smooth_by_ema adds to optax.sgd, {_measure.millions(params)}",
      "bandwidth floor",
      whole - base,
      2 * copy,
      "1.5",
      ours.temporaries,
    ),
    _measure.Row(
      f"smooth_by_ema after optax.sgd, {_measure.millions(params)}",
      "optax.sgd alone",
      whole,
      base,
      "-",
      ours.temporaries,
      alone.temporaries,
    ),
  ]


def ranger_radam_rows(rounds: int = 8, width: int = 2048) -> list[_measure.Row]:
  """The whole other Ranger, against PyTorch's on the same cores."""
  params, gradients = _measure.normal(0, width=width), _measure.normal(1, width=width)
  ours = _measure.training(ranger.ranger_radam(1e-3), params, gradients)
  radam = _measure.training(optax.radam(1e-3), params, gradients)
  size = sum(leaf.size for leaf in params)
  contenders = {"optax.radam, which does less": radam}
  if all(map(importlib.util.find_spec, ("torch", "pytorch_optimizer"))):
    contenders[_PYTORCH] = _pytorch_ranger(params, gradients)
  else:
    print(
      "SKIPPED: ranger_radam against PyTorch; pip install torch pytorch_optimizer",
      file=sys.stderr,
    )
  contenders["bandwidth floor"] = _measure.copying(size)
  seconds, *others = _measure.measure(
    "ranger_radam", [ours, *contenders.values()], rounds, calls=_EVERY
  )
  rivals = dict(zip(contenders, others, strict=True))
  # Gradient and slow copy read; moments and parameters read and written.
  rivals["bandwidth floor"] *= 8 / 2
  nothing = np.zeros(0)
  row = _measure.Row(
    f"ranger_radam, a step of {_measure.millions(params)}",
    _PYTORCH,
    seconds if _PYTORCH in rivals else nothing,
    rivals.pop(_PYTORCH, nothing),
    "1/4 = 0.25",
    ours.temporaries,
  )
  return [
    row,
    *(
      row._replace(rival=name, samples=seconds, rival_samples=rival, reach="-")
      for name, rival in rivals.items()
    ),
  ]


def _pytorch_ranger(params, gradients) -> _measure.Contender:
  torch = importlib.import_module("torch")
  package = importlib.import_module("pytorch_optimizer")

  torch.set_num_threads(_measure.cores())  # which is what XLA takes
  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  as_tensor = lambda leaf: torch.tensor(np.asarray(leaf), device=device)
  tensors = [torch.nn.Parameter(as_tensor(leaf)) for leaf in params]
  given = [as_tensor(leaf) for leaf in gradients]
  optimizer = package.Ranger(tensors, lr=1e-3, degenerated_to_sgd=True)

  def turn():
    for tensor, gradient in zip(tensors, given, strict=True):
      tensor.grad = gradient  # It centralizes in place, which is done once then.
    optimizer.step()
    if device == "cuda":
      torch.cuda.synchronize()

  return _measure.Contender(turn, 0)


def rows() -> list[_measure.Row]:
  return [*lookahead_rows(), *ema_rows(), *ranger_radam_rows()]


def main() -> None:
  measured = rows()
  print(_measure.machine())
  print(f"Copy rate: {_measure.copy_rate() / 1e9:.3g} GB/s\n")
  print(_measure.table(measured))


if __name__ == "__main__":
  main()
