"""The contract between the engine and a step: what the engine has found out already."""

from typing import Any
from typing import NamedTuple

from optax_ranger._core.types import Array


class Told(NamedTuple):
  """What a step over members is told as keywords of ``update``: it takes what it names.

  A step that is told leaves out nothing by itself, so that it is linear in the
  gradients where its idea is: a weighted mean, or a choice by the Gramian.

  Attributes:
    member_weights: ``float [n]``, with zero for members that are left out.
    num_dropped: ``int32``, how many were left out because they were not finite.
    losses: ``float [n]``, zeros before the forward pass; None where there are none.
    gramian: ``float [n, n]``, inner products of the members' gradients around a
      center, in a unit; None where the step does not name it.
    norms: ``float [n]``, of the members' whole gradients; None likewise.
    directions: norms again, and cosines of the angles between the gradients, ``float
      [n, n]``; None likewise.
  """

  member_weights: Array
  num_dropped: Array
  losses: Array | None = None
  gramian: Array | None = None
  norms: Array | None = None
  directions: Any = None

  def args(self) -> dict[str, Any]:
    """The keywords, without those that are None."""
    return {name: arg for name, arg in self._asdict().items() if arg is not None}
