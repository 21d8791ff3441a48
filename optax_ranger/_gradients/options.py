"""How the engine differentiates: the options of `value_and_grad` and `train_step`."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ranger._core.shards import AxisName
from optax_ranger._core.types import Neighbors
from optax_ranger._core.types import PyTree


class Options(NamedTuple):
  """What is the same for every batch.

  Attributes:
    has_aux: whether the losses come with a second result.
    micro_batch_size: examples whose gradients are held at once, per example.
    num_sweeps: how often these are computed; each time a part of every leaf is kept.
    num_micro_batches: pieces of the batch whose activations are held at once.
    axis_name: the mesh axis, or axes, over which devices hold rows of the batch.
    find_neighbors: makes ``neighbors=`` of rows of all devices.
    reduce: adds a gradient up over devices; None for one ``psum``.
    row_args: names of extra args that hold one row an example, besides `ROWS`.
    statistics: names of items of aux that hold no rows; None to leave aux as it is.
    along: names of items of aux that are wanted of all devices.
    tasks: whether a loss is that of a task, and not of a row of the batch.
    unreduced: mesh axes over which the compiler splits rows, and devices may keep their
      parts of a gradient until all micro-batches are done; none to leave that to it.
  """

  has_aux: bool = False
  micro_batch_size: int = 32
  num_sweeps: int = 1
  num_micro_batches: int = 1
  axis_name: AxisName = None
  find_neighbors: Callable[..., Neighbors] | None = None
  reduce: Callable[[PyTree], PyTree] | None = None
  row_args: tuple[str, ...] = ()
  statistics: tuple[str, ...] | None = None
  along: tuple[str, ...] = ()
  tasks: bool = False
  unreduced: tuple[str, ...] = ()

  def is_statistic(self, name: str, item: Any) -> bool:
    """Whether an item of aux holds no rows: declared so, or without any axis."""
    return name in (self.statistics or ()) or jax.tree.all(
      jax.tree.map(lambda leaf: jnp.ndim(leaf) == 0, item)
    )
