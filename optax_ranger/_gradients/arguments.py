"""The extra args that a step reads, gathered over devices where needed."""

from collections.abc import Callable
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core.members import clean_weights
from optax_ranger._core.sharding import per_row
from optax_ranger._core.shards import ROWS
from optax_ranger._core.shards import Shards
from optax_ranger._core.types import Array
from optax_ranger._core.types import Neighbors
from optax_ranger._core.types import PyTree
from optax_ranger._gradients import linear


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


class Gathered:
  """The extra args of a step over examples, with the rows of all devices.

  One collective brings them, together with what is known of the examples only
  after the losses: `meet` names items of aux that shall come along, to `met`.
  """

  def __init__(
    self,
    shards: Shards,
    step: optax.GradientTransformationExtraArgs,
    state: PyTree,
    batch: PyTree,
    extra_args: dict[str, Any],
    find_neighbors: Callable[..., Neighbors] | None,
    meet: tuple[str, ...] = (),
  ):
    self.met: dict[str, Any] = {}
    self._shards, self._meet = shards, meet
    self._find = find_neighbors
    self._items = {**_items(batch), **extra_args}
    args = {name: arg for name, arg in extra_args.items() if arg is not None}
    args.pop("smoothed", None)
    self._rows = {
      name: jax.tree.map(jnp.asarray, arg)
      for name, arg in args.items()
      if name in ROWS or shards.is_apart(arg)
    }
    blank = jax.tree.map(
      lambda leaf: jnp.zeros([shards.total, *leaf.shape[1:]], leaf.dtype), self._rows
    )
    blank["losses"] = jnp.zeros([shards.total])
    self._read = jax.tree.map(lambda _: True, blank)
    if shards.axis_name is not None:
      given = {"neighbors": blank_neighbors(shards.total)} if find_neighbors else {}
      self._read = linear.reads(step, shards.total, state, {**args, **given}, blank)
    self._args = {**args, **blank}

  def args(self, finite: Array, losses: Any, aux: Any) -> dict[str, Any]:
    """For these examples; losses are zeros while they are not known."""
    local: dict[str, Any] = {"finite": finite}
    # What is not read is not sent; what was sent is not sent again.
    wanted = lambda name: [
      leaf for leaf, read in self._flags(self._rows[name], name) if read
    ]
    local["rows"] = {name: wanted(name) for name in self._rows}
    if losses is not None and self._read["losses"]:
      local["losses"] = losses
    aux = _items(aux)
    if losses is not None:
      local["met"] = {name: aux[name] for name in self._meet if name in aux}
    if self._find is not None:
      local["found"] = _named(self._find, {**aux, **self._items})
    everywhere = self._shards.gather(local)
    for name, leaves in everywhere["rows"].items():
      found = iter(leaves)
      structure = jax.tree.structure(self._rows[name])
      self._args[name] = structure.unflatten(
        next(found) if read else blank
        for blank, read in self._flags(self._args[name], name)
      )
    self._rows = {}
    self.met = everywhere.get("met", self.met)
    weights, _, num_dropped = clean_weights(
      self._args.get("member_weights"), self._shards.total, finite=everywhere["finite"]
    )
    own: dict[str, Any] = {"member_weights": weights, "num_dropped": num_dropped}
    if "losses" in everywhere:
      own["losses"] = everywhere["losses"]
    if self._find is not None:
      own["neighbors"] = _find(self._find, everywhere["found"], weights)
    return {**self._args, **own}

  def _flags(self, tree: PyTree, name: str) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return zip(leaves, structure.flatten_up_to(self._read[name]), strict=True)


def blank_neighbors(n: int) -> Neighbors:
  """No neighbors, of n examples."""
  return Neighbors(
    jnp.full([n, 1], -1, jnp.int32), jnp.zeros([n, 1]), jnp.zeros([n, 1])
  )


def _items(tree: PyTree) -> dict[str, Any]:
  return dict(tree) if isinstance(tree, dict) else {}


def _named(find_neighbors: Callable[..., Any], items: dict[str, Any]) -> dict[str, Any]:
  """What a function asks for, or a refusal that names what is not there."""
  for one in inspect.signature(find_neighbors).parameters.values():
    required = one.default is one.empty and one.kind is not one.VAR_KEYWORD
    if required and one.name not in items:
      raise ValueError(
        f"find_neighbors asks for {one.name!r}, which is neither in the batch, nor in"
        f" aux, nor an extra arg; there are {sorted(items)}."
      )
  accepts = accepted_names(find_neighbors)
  return {name: item for name, item in items.items() if accepts(name)}


def _find(
  find_neighbors: Callable[..., Neighbors],
  rows: dict[str, Any],
  weights: Array,
) -> Neighbors:
  """Neighbors among the rows of all devices; those that are absent have none."""

  def present(leaf):
    leaf = jax.lax.stop_gradient(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    here = per_row(weights > 0, leaf)
    return jnp.where(here, leaf, jnp.full_like(leaf, jnp.nan))

  return find_neighbors(**jax.tree.map(present, rows))
