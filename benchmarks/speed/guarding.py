"""Guards against what Optax has: `python -m benchmarks.speed.guarding`."""

import optax

from benchmarks.speed import _measure
from benchmarks.speed import _steps
import optax_ranger as ranger


def one_step_rows(rounds: int = 20, width: int = 2048) -> list[_measure.Row]:
  """A step of 32 M parameters that is watched, and one that is not."""
  params, gradients = _measure.normal(0, width=width), _measure.normal(1, width=width)
  adamw = optax.adamw(1e-3)
  rival = "optax.apply_if_finite(adamw)"
  if_finite = optax.apply_if_finite(adamw, 10)
  skip, anomalies = ranger.skip_nonfinite(adamw), ranger.skip_anomalies(adamw)
  reach = f"1.25, under {_steps.room(params)}"
  pairs = (
    ("skip_nonfinite(adamw)", skip, "adamw", adamw, reach),
    ("skip_nonfinite(adamw)", skip, rival, if_finite, "-"),
    ("skip_anomalies(adamw)", anomalies, "adamw", adamw, reach),
  )
  return _steps.step_rows(pairs, params, gradients, rounds)


def main() -> None:
  rows = one_step_rows()
  print(_measure.machine())
  print(_measure.table(rows))


if __name__ == "__main__":
  main()
