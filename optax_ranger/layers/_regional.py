"""Local computation in every region of the input, then one combination of them."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.types import Array
from optax_ranger.layers import _partitions

_WAYS = ("mean", "sum", "max")


class RegionalAggregator(nnx.Module):
  r"""Runs a local network in every region of its input, and combines the results.

  What costs more than linearly in the size of its input (attention, graphs) costs
  less in regions; what should differ from place to place may.

  .. math::
    y = \frac{\sum_r w_r \, f_r(x_r)}{\sum_r w_r}, \quad
    \sum_r w_r \, f_r(x_r), \quad \text{or} \quad \max_r f_r(x_r)

  Regions without content (of ``Centers``, of ``Graph``) count for nothing.

  Args:
    partition: how to split the input: ``Grid``, ``TimeWindows``, ``Centers`` or
      ``Graph``. It says what the local network is called with.
    local: the local network: a module, shared by all regions, or a function
      ``rngs -> module``, which needs ``rngs=``. What comes out has leading axis
      batch, and the same shape for every region. All regions run in one call:
      a shared module sees them as more of the batch (on a ``Graph``, vmapped),
      one for each runs vmapped.
    aggregator: ``"mean"`` (weighted), ``"sum"`` (weighted) or ``"max"``, entry by
      entry.
    weights: what each region weighs: None for one, ``float [num_regions]``, not
      negative, or ``"learned"``: positive parameters that start as ones.
    shared: whether a function `local` makes one network for all regions, or one
      for each.
    rngs: for a function `local`.

  Call:
    ``layer(inputs, region_weights=None)``: weights given at the call,
    ``float [num_regions]`` or ``[batch, num_regions]``, multiply those above.

  Returns:
    ``[batch, ...]``, what the local networks return, combined.

  Guarantees:
    * Gradients flow through everything, weights included.
    * The result equals a loop over regions.
    * Empty regions are left out.

  Raises:
    TypeError: for a `local` that is neither a module nor a function.
    ValueError: for other aggregators, weights with ``"max"``, lengths that do not
      fit, and inputs that the partition cannot split.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from optax_ranger import layers
    >>> local = lambda rngs: nnx.RNN(nnx.SimpleCell(3, 5, rngs=rngs))
    >>> layer = layers.RegionalAggregator(
    ...     layers.TimeWindows(4), local, "mean", weights="learned", rngs=nnx.Rngs(0))
    >>> run = nnx.jit(lambda layer, x: layer(x))
    >>> print(run(layer, jnp.ones([2, 100, 3])).shape)
    (2, 25, 5)
    >>> linen = nnx.bridge.to_linen(  # the same layer, for Linen
    ...     layers.RegionalAggregator, layers.Grid((2,)),
    ...     lambda rngs: nnx.Linear(3, 5, rngs=rngs), "sum", shared=False)
  """

  def __init__(
    self,
    partition: Any,
    local: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    aggregator: str = "mean",
    *,
    weights: Any = None,
    shared: bool = True,
    rngs: nnx.Rngs | None = None,
  ):
    validate.choice("aggregator", aggregator, _WAYS)
    if not isinstance(partition, _partitions.Partition):
      raise TypeError(
        f"partition must be a Grid, TimeWindows, Centers or Graph, got {partition!r}."
      )
    count = partition.num_regions
    if aggregator == "max" and weights is not None:
      raise ValueError(f"aggregator='max' takes no weights, got {weights!r}.")
    self.partition = partition
    self.aggregator = aggregator
    self.shared = shared or isinstance(local, nnx.Module)
    if isinstance(local, nnx.Module):
      if not shared:
        raise ValueError(
          "shared=False needs local to be a function of rngs, got a module."
        )
      self.local = local
    elif not callable(local):
      raise TypeError(
        f"local must be a module or a function rngs -> module, got {local!r}."
      )
    elif rngs is None:
      raise ValueError("a function local needs rngs=, got None.")
    elif shared:
      self.local = local(rngs)
    else:
      make = nnx.vmap(lambda rngs: local(rngs), axis_size=count)
      self.local = make(rngs.split(count))
    learned, given = None, None
    if isinstance(weights, str):
      validate.choice("weights", weights, ("learned",))
      learned = nnx.Param(jnp.zeros([count]))
    elif weights is not None:
      validate.shape("weights", weights, (count,))
      if validate.is_known(weights) and (np.asarray(weights) < 0).any():
        raise ValueError(f"weights must not be negative, got {weights!r}.")
      given = nnx.Variable(jnp.asarray(weights))
    self.log_weights = nnx.data(learned)
    self.given_weights = nnx.data(given)

  def __call__(self, inputs: Array, region_weights: Array | None = None) -> Array:
    count, batch = self.partition.num_regions, inputs.shape[0]
    pieces, present = self.partition.split(inputs)
    results = self._run(pieces, batch)
    weights = jnp.ones([batch, count], results.dtype)
    if self.log_weights is not None:
      weights = weights * jnp.exp(self.log_weights[...]).astype(weights.dtype)[None]
    if self.given_weights is not None:
      weights = weights * self.given_weights[...].astype(weights.dtype)[None]
    if region_weights is not None:
      if self.aggregator == "max":
        raise ValueError("aggregator='max' takes no region_weights.")
      given = jnp.asarray(region_weights).astype(weights.dtype)
      if given.ndim == 1:
        given = given[None]
      if given.shape not in ((1, count), (batch, count)):
        raise ValueError(
          f"region_weights must have shape [{count}] or [{batch}, {count}], got"
          f" {list(jnp.shape(region_weights))}."
        )
      weights = weights * given
    if present is not None:
      weights = jnp.where(present.T, weights, jnp.zeros_like(weights))
    per_row = jnp.expand_dims(weights.T, tuple(range(2, results.ndim)))
    if self.aggregator == "max":
      least = jnp.asarray(jnp.finfo(results.dtype).min, results.dtype)
      largest = jnp.where(per_row > 0, results, least).max(axis=0)
      alive = (per_row > 0).any(axis=0)
      return jnp.where(alive, largest, jnp.zeros_like(largest))
    # Selected, not multiplied: what a region without content makes may be NaN.
    kept = jnp.where(per_row > 0, results, jnp.zeros_like(results))
    total = (per_row * kept).sum(axis=0)
    if self.aggregator == "sum":
      return total
    divisor = jnp.broadcast_to(per_row.sum(axis=0), total.shape)
    return numerics.divide(total, divisor)

  def _run(self, pieces: tuple[Array, ...], batch: int) -> Array:
    """The local results of all regions, ``[num_regions, batch, ...]``."""
    if self.shared and not isinstance(self.partition, _partitions.Graph):
      # Regions join the batch, the batch first: so it stays split over devices.
      count = pieces[0].shape[0]
      whole = lambda piece: (batch * count, *piece.shape[2:])
      join = lambda piece: jnp.moveaxis(piece, 0, 1).reshape(whole(piece))
      results = self.local(*map(join, pieces))
      apart = results.reshape(batch, count, *results.shape[1:])
      return jnp.moveaxis(apart, 1, 0)
    axes = (None if self.shared else 0, *(0 for _ in pieces))
    graph, params, others = nnx.split(self.local, nnx.Param, ...)
    if not jax.tree.leaves(others):
      # Also where a jitted function closes over the layer, unlike nnx.vmap.
      call = lambda params, *pieces: nnx.merge(graph, params, others)(*pieces)
      return jax.vmap(call, in_axes=axes)(params, *pieces)
    call = nnx.vmap(lambda local, *pieces: local(*pieces), in_axes=axes)
    return call(self.local, *pieces)
