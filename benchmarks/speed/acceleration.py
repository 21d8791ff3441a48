"""Step 3 against plain optimizers: `python -m benchmarks.speed.acceleration`."""

import optax

from benchmarks.speed import _measure
from benchmarks.speed import _steps
import optax_ranger as ranger

_RATE = 1e-3


def one_step_rows(rounds: int = 20, width: int = 2048) -> list[_measure.Row]:
  """A step of 32 M parameters, against the same step without a learned factor."""
  params, gradients = _measure.normal(0, width=width), _measure.normal(1, width=width)
  rate = optax.scale_by_learning_rate(_RATE)
  sgd = optax.sgd(_RATE, momentum=0.9, nesterov=True)
  adamw = optax.adamw(_RATE)
  per_leaf = optax.chain(ranger.scale_by_ngs(per_leaf=True), rate)
  cautious = ranger.mask_contradictions(adamw)
  reach = f"1.35, under {_steps.room(params)}"
  pairs = (
    (
      "scale_by_ngs",
      optax.chain(ranger.scale_by_ngs(), rate),
      "Nesterov SGD",
      sgd,
      reach,
    ),
    ("scale_by_ngs, per leaf", per_leaf, "Nesterov SGD", sgd, reach),
    ("accelerate(adamw)", ranger.accelerate(adamw), "adamw", adamw, reach),
    ("mask_contradictions(adamw)", cautious, "adamw", adamw, "-"),
  )
  return _steps.step_rows(pairs, params, gradients, rounds)


def main() -> None:
  rows = one_step_rows()
  print(_measure.machine())
  print(_measure.table(rows))


if __name__ == "__main__":
  main()
