"""What a state class declares of itself, for code that knows no step.

A state is a NamedTuple; beside its fields it may have

* ``split_by_rows = ("table",)``: fields of ``[num_examples, ...]`` that may be split
  over devices by rows. With it come a method ``readers() -> {"name": ids -> rows}``,
  for rows that the losses may ask for by these names, and ``gathered = ("name",)``,
  items of ``aux`` that ``update`` needs from all devices, beside ``example_ids=``;
* ``open_window = "accumulated"``: the field with the sum of a window that is still
  open, a tree like the parameters, and ``inside = "inner_state"``, the state within;
  its ``weight_sum`` is positive once there is something in the sum;
* ``idles = True``: with ``update(..., present=False)`` it leaves everything as it is,
  so that no copy is needed to go back to;
* a method ``smoothed_copy() -> (share, copy)``: a smoothed copy of the parameters, and
  the share of the newest parameters to mix into it, in [0, 1].
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import export
import jax.numpy as jnp

from optax_ranger._core.tree import find_states
from optax_ranger._core.types import PyTree


def exportable(state_class: type) -> type:
  """Registers a state, so that ``jax.export`` can serialize functions of it."""
  name = f"optax_ranger.{state_class.__name__}"
  export.register_namedtuple_serialization(state_class, serialized_name=name)
  return state_class


def declares(name: str) -> Callable[[Any], bool]:
  """Tells whether a node of a state declares something of this name."""
  return lambda node: isinstance(node, tuple) and hasattr(type(node), name)


def tables(state: PyTree) -> list[Any]:
  """The states with fields that are split by rows, however deeply nested."""
  return list(find_states(state, declares("split_by_rows")))


def smoothed_copies(state: PyTree) -> list[tuple[Any, PyTree]]:
  """The share and the smoothed copy of every state that has one."""
  found = find_states(state, declares("smoothed_copy"))
  return [node.smoothed_copy() for node in found]


def windows(state: PyTree) -> list[PyTree]:
  """The sums of the windows that are open, each like the parameters."""
  found = find_states(state, declares("open_window"))
  return [getattr(node, node.open_window) for node in found]


def is_open(state: PyTree) -> Any:
  """Whether a window holds something that the end of the data would lose."""
  found = find_states(state, declares("open_window"))
  return jnp.asarray([node.weight_sum > 0 for node in found], bool).any()


def idles(state: PyTree) -> bool:
  """Whether a state with an open window can be kept by ``present=`` alone.

  Besides states that idle, it may hold scalars, which cost nothing to choose between.
  """
  is_idle = declares("idles")
  others = [
    leaf for leaf in jax.tree.leaves(state, is_leaf=is_idle) if not is_idle(leaf)
  ]
  return bool(windows(state)) and all(jnp.ndim(leaf) == 0 for leaf in others)


def choose(present: Any, new: PyTree, old: PyTree) -> PyTree:
  """The new state or the old one, where states that idle have chosen already."""
  is_idle = declares("idles")

  def one(new, old):
    return new if is_idle(new) else jnp.where(present, new, old)

  return jax.tree.map(one, new, old, is_leaf=is_idle)


def map_windows(
  function: Callable[..., Any], state: PyTree, *, with_path: bool = False
) -> PyTree:
  """Maps the leaves of the sums of the windows that are open."""
  map_ = jax.tree_util.tree_map_with_path if with_path else jax.tree.map
  is_window = declares("open_window")

  def visit(node):
    if not is_window(node):
      return node
    name = node.open_window
    return node._replace(**{name: map_(function, getattr(node, name))})

  return jax.tree.map(visit, state, is_leaf=is_window)
