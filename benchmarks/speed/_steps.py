"""Rows of an optimizer's step against another's: both with 32 M parameters."""

from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.speed import _measure

# A name, an optimizer, its rival's name, the rival, and the ratio that is aimed at.
Pair = tuple[str, Any, str, Any, str]


def step_rows(
  pairs: Sequence[Pair], params: Any, gradients: Any, rounds: int
) -> list[_measure.Row]:
  """One row for each pair; a pair takes turns with itself only."""
  rows = []
  for name, tx, rival_name, rival, reach in pairs:
    ours = _measure.training(tx, params, gradients)
    theirs = _measure.training(rival, params, gradients)
    seconds, rival_seconds = _measure.measure(name, [ours, theirs], rounds, calls=3)
    rows.append(
      _measure.Row(
        f"{name}, {_measure.millions(params)}",
        rival_name,
        seconds,
        rival_seconds,
        reach,
        ours.temporaries,
        theirs.temporaries,
      )
    )
  return rows


def room(params: Any) -> str:
  """A hundredth of the parameters, in words."""
  return f"{0.01 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6:.3g} MB"
