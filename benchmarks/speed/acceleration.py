"""Step 3 against Nesterov SGD: `python -m benchmarks.speed.acceleration`."""

import optax

from benchmarks.speed import _measure
import optax_ranger as ranger

_RATE = 1e-3


def one_step_rows(rounds: int = 20, width: int = 2048) -> list[_measure.Row]:
  """A step of 32 M parameters, against the same step without a learned factor."""
  params, gradients = _measure.normal(0, width=width), _measure.normal(1, width=width)
  rate = optax.scale_by_learning_rate(_RATE)
  sgd = optax.sgd(_RATE, momentum=0.9, nesterov=True)
  adamw = optax.adamw(_RATE)
  room = f"{0.01 * sum(leaf.nbytes for leaf in params) / 1e6:.3g} MB"
  pairs = (
    ("scale_by_ngs", optax.chain(ranger.scale_by_ngs(), rate), "Nesterov SGD", sgd),
    (
      "scale_by_ngs, per leaf",
      optax.chain(ranger.scale_by_ngs(per_leaf=True), rate),
      "Nesterov SGD",
      sgd,
    ),
    ("accelerate(adamw)", ranger.accelerate(adamw), "adamw", adamw),
  )
  rows = []
  for name, tx, rival_name, rival in pairs:
    ours = _measure.training(tx, params, gradients)
    theirs = _measure.training(rival, params, gradients)
    seconds, rival_seconds = _measure.measure(name, [ours, theirs], rounds, calls=3)
    rows.append(
      _measure.Row(
        f"{name}, {_measure.millions(params)}",
        rival_name,
        seconds,
        rival_seconds,
        f"1.35, under {room}",
        ours.temporaries,
        theirs.temporaries,
      )
    )
  return rows


def main() -> None:
  rows = one_step_rows()
  print(_measure.machine())
  print(_measure.table(rows))


if __name__ == "__main__":
  main()
