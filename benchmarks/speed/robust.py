"""Medians over members: `python -m benchmarks.speed.robust`."""

import jax
import jax.numpy as jnp

from benchmarks.speed import _measure
import optax_ranger as ranger

_MEMBERS = 17


def median_rows(rounds: int = 9, size: int = 2**20) -> list[_measure.Row]:
  """Seventeen members, against sorting them."""
  members = jax.random.normal(jax.random.key(0), [_MEMBERS, size])
  apply = lambda step: _measure.stateless(
    lambda rows: step.update(rows, step.init(rows))[0], members
  )
  contenders = [
    apply(ranger.aggregate_by_median()),
    apply(ranger.aggregate_by_trimmed_mean(0.2)),
    _measure.stateless(lambda rows: jnp.median(rows, axis=0), members),
  ]
  *ours, rival = _measure.measure("medians", contenders, rounds)
  names = ("aggregate_by_median", "aggregate_by_trimmed_mean")
  return [
    _measure.Row(
      f"{name}, {_MEMBERS} members of {size / 1e6:.0f} M",
      "jnp.median",
      times,
      rival,
      "-",
      contender.temporaries,
      contenders[-1].temporaries,
    )
    for name, times, contender in zip(names, ours, contenders, strict=False)
  ]


if __name__ == "__main__":
  print(_measure.machine())
  print(_measure.table(median_rows()))
