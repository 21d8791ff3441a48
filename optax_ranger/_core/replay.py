"""An optimizer's update as a list of operations: guarded, and computed in parts.

A `cond` around an optimizer writes all that it returns to memory. Here a bad update
is undone operation by operation: each new entry of the state is replaced by the old
one right where it arises, and what follows reads the entry that is stored. So XLA
fuses the guard with the optimizer, and needs no copy of its state.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp

from optax_ranger._core.sharding import like
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree

# Operations whose result at an entry depends on their arguments at that entry. What
# is missing here costs memory, not correctness.
_ENTRYWISE = frozenset({
  "abs", "add", "and", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos",
  "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
  "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne",
  "neg", "not", "or", "pow", "round", "rsqrt", "select_n", "sign", "sin", "sqrt",
  "square", "sub", "tanh", "xor",
})  # fmt: skip


class Node(NamedTuple):
  """A value, and how it came about.

  Attributes:
    value: the array.
    eqn: the operation, if it works entry by entry; else None.
    inputs: of the operation.
  """

  value: Any
  eqn: Any = None
  inputs: tuple["Node", ...] = ()

  def part(self, take: Callable[[Array], Array]) -> Array:
    """The part of the value that `take` takes, computed from such parts."""
    return self._part(take, self.value.shape, {})

  def _part(self, take: Any, shape: tuple[int, ...], known: dict[int, Any]) -> Array:
    # Scalars are no parts: operations take them beside arrays of any shape.
    if jnp.shape(self.value) != shape:
      return self.value
    if self.eqn is None:
      return take(self.value)
    if id(self) not in known:
      inputs = [each._part(take, shape, known) for each in self.inputs]
      (known[id(self)],) = _bind(self.eqn, inputs)
    return known[id(self)]


def guarded(
  function: Callable[[PyTree], tuple[PyTree, PyTree]], old: PyTree, good: Array
) -> tuple[PyTree, PyTree]:
  """Runs an update, and keeps the old state where `good` is false.

  Args:
    function: from a state to an update and a new state.
    old: the state.
    good: a boolean, whether the state may advance.

  Returns:
    The update, with a `Node` for each leaf, which means nothing where `good` is
    false; and the state.

  Raises:
    TypeError: if the new state differs from the old one in structure, shapes or
      types.
  """
  closed, (updates, new) = jax.make_jaxpr(function, return_shape=True)(old)
  leaves, structure = jax.tree.flatten(old)
  _check(new, leaves, structure)
  jaxpr = closed.jaxpr
  count = len(jaxpr.outvars) - len(leaves)
  states = jaxpr.outvars[count:]
  guards = _guards(jaxpr, states, leaves)
  nodes = _run(jaxpr, closed.consts, [Node(leaf) for leaf in leaves], guards, good)
  kept = [
    node.value if _is_in(var, guards) else jnp.where(good, like(node.value, leaf), leaf)
    for var, node, leaf in zip(states, nodes[count:], leaves, strict=True)
  ]
  return (
    jax.tree.structure(updates).unflatten(nodes[:count]),
    structure.unflatten(kept),
  )


def _check(new: PyTree, leaves: Sequence[Any], structure: Any) -> None:
  found, name = jax.tree.structure(new), "the inner optimizer"
  if found != structure:
    raise TypeError(f"{name} must return a state of {structure}, got {found}.")
  for (path, leaf), old in zip(
    jax.tree_util.tree_leaves_with_path(new), leaves, strict=True
  ):
    if (leaf.shape, leaf.dtype) != (jnp.shape(old), jnp.result_type(old)):
      raise TypeError(
        f"{name} must keep shapes and types of its state, got {leaf.shape},"
        f" {leaf.dtype} for {jnp.shape(old)}, {jnp.result_type(old)} at"
        f" {jax.tree_util.keystr(path)}."
      )


def _guards(jaxpr: Any, outputs: Sequence[Any], old: Sequence[Any]) -> dict[Any, Array]:
  """What to put in place of variables right where they arise."""
  return {
    var: leaf
    for var, leaf in zip(outputs, old, strict=True)
    if leaf is not None
    and not isinstance(var, core.Literal)
    and var not in (*jaxpr.invars, *jaxpr.constvars)
    and sum(other is var for other in outputs) == 1
  }


def _is_in(var: Any, guards: dict[Any, Array]) -> bool:
  return not isinstance(var, core.Literal) and var in guards


def _run(
  jaxpr: Any,
  consts: Sequence[Any],
  arguments: Sequence[Node],
  guards: dict[Any, Array],
  good: Array,
) -> list[Node]:
  """The outputs. Of `guards`, what could not be guarded is taken out."""
  known: dict[Any, Node] = {}
  read = lambda var: Node(var.val) if isinstance(var, core.Literal) else known[var]
  known.update(zip(jaxpr.constvars, map(Node, consts), strict=True))
  known.update(zip(jaxpr.invars, arguments, strict=True))
  for eqn in jaxpr.eqns:
    inputs = tuple(map(read, eqn.invars))
    if eqn.primitive.name == "jit":
      inner, wanted = eqn.params["jaxpr"], [guards.get(var) for var in eqn.outvars]
      inside = _guards(inner.jaxpr, inner.jaxpr.outvars, wanted)
      nodes = _run(inner.jaxpr, inner.consts, inputs, inside, good)
      done = [_is_in(var, inside) for var in inner.jaxpr.outvars]
    else:
      values = _bind(eqn, [node.value for node in inputs])
      # Operations may stretch axes of length one: no part of these is taken.
      allowed = (jnp.shape(values[0]), ()) if values else ()
      entrywise = eqn.primitive.name in _ENTRYWISE and all(
        jnp.shape(node.value) in allowed for node in inputs
      )
      nodes = [Node(v, eqn, inputs) if entrywise else Node(v) for v in values]
      done = [False] * len(nodes)
    for var, node, is_done in zip(eqn.outvars, nodes, done, strict=True):
      if var in guards and not is_done:
        if jax.typeof(node.value).sharding == jax.typeof(guards[var]).sharding:
          node = Node(jnp.where(good, node.value, guards[var]))
        else:  # What follows was traced with another sharding than the state's.
          del guards[var]
      known[var] = node
  return list(map(read, jaxpr.outvars))


def _bind(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
  with eqn.ctx.manager:
    params = eqn.primitive.get_bind_params(eqn.params)
    found = eqn.primitive.bind(*inputs, **params)
  return list(found) if eqn.primitive.multiple_results else [found]
