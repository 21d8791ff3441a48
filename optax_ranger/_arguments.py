"""What a step over examples is told of them, wherever they are."""

from collections.abc import Callable
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from optax_ranger import _members
from optax_ranger import _numerics
from optax_ranger import _shards
from optax_ranger import _types


def accepted_names(function: Callable[..., Any]) -> Callable[[str], bool]:
  """Which keywords a function takes."""
  parameters = inspect.signature(function).parameters.values()
  if any(one.kind is one.VAR_KEYWORD for one in parameters):
    return lambda name: True
  names = {one.name for one in parameters if one.kind is not one.VAR_POSITIONAL}
  return lambda name: name in names


def needs_values(find_neighbors: Any, batch: Any, extra_args: dict[str, Any]) -> bool:
  """Whether neighbors are found by what the model says."""
  if find_neighbors is None:
    return False
  known = {*(batch if isinstance(batch, dict) else ()), *extra_args}
  return not set(inspect.signature(find_neighbors).parameters) <= known


def gathered(
  shards: _shards.Shards,
  batch: _types.PyTree,
  extra_args: dict[str, Any],
  find_neighbors: Callable[..., _types.Neighbors] | None,
) -> Callable[..., dict[str, Any]]:
  """Makes the step's extra args of this device's: rows of all devices, gathered."""
  by_row = lambda name, arg: name in _shards.ROWS or shards.is_apart(arg)
  args = {
    name: shards.gather(arg) if by_row(name, arg) else arg
    for name, arg in extra_args.items()
    if arg is not None and name != "smoothed"
  }

  def step_args(finite, losses, aux):
    weights, _, num_dropped = _members.clean_weights(
      args.get("member_weights"), shards.total, finite=shards.gather(finite)
    )
    own: dict[str, Any] = {"member_weights": weights, "num_dropped": num_dropped}
    own["losses"] = (
      jnp.zeros([shards.total]) if losses is None else shards.gather(losses)
    )
    if find_neighbors is not None:
      local = {**_items(batch), **_items(aux), **extra_args}
      own["neighbors"] = _find(find_neighbors, shards, local, weights)
    return {**args, **own}

  return step_args


def _items(tree: _types.PyTree) -> dict[str, Any]:
  return dict(tree) if isinstance(tree, dict) else {}


def _find(
  find_neighbors: Callable[..., _types.Neighbors],
  shards: _shards.Shards,
  local: dict[str, Any],
  weights: _types.Array,
) -> _types.Neighbors:
  """Neighbors among the rows of all devices; those that are absent have none."""
  accepts = accepted_names(find_neighbors)
  rows = {name: arg for name, arg in local.items() if accepts(name)}

  def present(leaf):
    leaf = jax.lax.stop_gradient(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    here = _numerics.per_row(weights > 0, leaf)
    return jnp.where(here, leaf, jnp.full_like(leaf, jnp.nan))

  return find_neighbors(**jax.tree.map(present, shards.gather(rows)))
