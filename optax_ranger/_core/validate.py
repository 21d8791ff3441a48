"""Checks of arguments: each error names the argument, its value and the leaf.

Numbers that are traced pass, so that hyperparameters may be data.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import difflib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ranger._core.sharding import varying_axes
from optax_ranger._core.types import PyTree


def is_known(value: Any) -> bool:
  """Whether `value` can be looked at now: a number, not a traced array."""
  return not isinstance(value, jax.core.Tracer)


def is_key(value: Any) -> bool:
  """Whether `value` is one typed key of ``jax.random``."""
  if not isinstance(value, jax.Array) or value.ndim:
    return False
  return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def in_range(
  name: str,
  value: Any,
  low: float,
  high: float,
  *,
  open_low: bool = False,
  open_high: bool = False,
) -> None:
  """Refuses a number outside of [low, high], or of the half-open range."""
  if not is_known(value):
    return
  number = _number(name, value)
  above = number > low if open_low else number >= low
  below = number < high if open_high else number <= high
  if not (above and below):
    left, right = "(" if open_low else "[", ")" if open_high else "]"
    raise ValueError(
      f"{name} must lie in {left}{low:g}, {high:g}{right}, got {value!r}."
    )


def count(name: str, value: Any, least: int = 1) -> None:
  """Refuses what is not a whole number of at least `least`."""
  if not is_known(value):
    return
  number = _number(name, value)
  if number != int(number) or number < least:
    raise ValueError(
      f"{name} must be a whole number of at least {least}, got {value!r}."
    )


def static_count(name: str, value: Any, least: int = 1) -> None:
  """Refuses what is not a Python integer of at least `least`: it sets a shape."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    raise TypeError(
      f"{name} sets the shape of an array and must be a Python integer, got {value!r}."
    )
  count(name, value, least)


def integer(name: str, value: Any) -> None:
  """Refuses what is not a Python integer."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    raise TypeError(
      f"{name} must be a Python integer, got {value!r}; with optax.inject_hyperparams,"
      f' name it in static_args=("{name}", ...).'
    )


def choice(name: str, value: Any, options: Sequence[Any]) -> None:
  """Refuses what is not one of the options."""
  if value not in options:
    listed = ", ".join(repr(option) for option in options)
    raise ValueError(f"{name} must be one of {listed}; got {value!r}.")


class MissingError(ValueError):
  """A step lacks an extra arg; `how` tells what to do, whoever is called."""

  def __init__(self, name: str, step: str, how: str = ""):
    call = f"call update(updates, state, params, {name}=...)"
    super().__init__(f"{step} needs {name}=: {call}{how}.")
    self.name, self.step, self.how = name, step, how

  def when_calling(self, call: str) -> ValueError:
    """The same, for who calls something else than `update`."""
    how = f"{self.name}=...){self.how}"
    return ValueError(f"{self.step} needs {self.name}=: call {call}, {how}.")


def given(name: str, value: Any, step: str, how: str = "") -> None:
  """Refuses a call of `update` that lacks an extra argument which `step` needs."""
  if value is None:
    raise MissingError(name, step, how)


def given_params(params: PyTree, step: str) -> None:
  """Refuses a call of `update` without the parameters."""
  if params is None:
    raise ValueError(f"{step} needs params: call update(updates, state, params).")


def shape(name: str, value: Any, expected: tuple[int, ...]) -> None:
  """Refuses an array of another shape."""
  if jnp.shape(value) != expected:
    raise ValueError(
      f"{name} must have shape {list(expected)}, got {list(jnp.shape(value))}."
    )


def integers(name: str, value: Any) -> None:
  """Refuses an array that does not hold integers."""
  if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
    raise TypeError(f"{name} must hold integers, got {jnp.result_type(value)}.")


def positions(name: str, value: Any, n: int) -> None:
  """Refuses positions at or past the end, where they can be looked at now."""
  if not is_known(value) or not getattr(value, "is_fully_addressable", True):
    return
  # NumPy: under a trace, an operation of JAX on known arrays is traced too.
  known = np.asarray(value)
  if known.size and known.max() >= n:
    raise ValueError(f"{name} must be less than n = {n}, got {known.max()}.")


def inexact_leaves(name: str, tree: PyTree, step: str) -> None:
  """Refuses a tree with a leaf that holds integers or booleans."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
      raise TypeError(
        f"{step} needs floating-point {name}, got {jnp.result_type(leaf)} at"
        f" {name}{jax.tree_util.keystr(path)}; leave such leaves out with"
        " optax.masked."
      )


def leading_axis(name: str, tree: PyTree) -> int | None:
  """Returns the length that all leaves share as their first axis, or refuses."""
  first: tuple[str, int] | None = None
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    where = f"{name}{jax.tree_util.keystr(path)}"
    if jnp.ndim(leaf) < 1:
      raise ValueError(
        f"{where} is a scalar, but every leaf needs a leading axis over the examples."
      )
    length = jnp.shape(leaf)[0]
    if first is None:
      first = where, length
    elif length != first[1]:
      raise ValueError(
        f"every leaf needs the same leading axis, but {first[0]} has"
        f" {first[1]} and {where} has {length}."
      )
  return None if first is None else first[1]


def same_rows(name: str, tree: PyTree, n: int) -> None:
  """Refuses an extra arg of other than one row for each of the batch's."""
  length = leading_axis(name, tree)
  if length is not None and length != n:
    raise ValueError(f"{name} must have one row per example, {n} in all, got {length}.")


def reduced(name: str, tree: PyTree, like: PyTree, step: str) -> None:
  """Refuses leaves that vary over mesh axes over which those of `like` don't."""
  for (path, leaf), other in zip(
    jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True
  ):
    varying = varying_axes(leaf) - varying_axes(other)
    if varying:
      axes = ", ".join(repr(axis) for axis in sorted(varying))
      raise ValueError(
        f"{name}{jax.tree_util.keystr(path)} differs over the mesh axis {axes},"
        f" and {step} would decide on each device alone: reduce it first"
        " (jax.lax.pmean), or compute the gradient with micro_batched, which"
        " reduces once at the end."
      )


def _number(name: str, value: Any) -> float:
  numeric = isinstance(value, (int, float, np.number, np.ndarray, jax.Array))
  if not numeric or isinstance(value, bool) or np.ndim(value) != 0:
    raise TypeError(f"{name} must be a number, got {value!r}.")
  number = float(value)
  if math.isnan(number):
    raise ValueError(f"{name} must be a number, got {value!r}.")
  return number


def state(given: Any, kind: type, step: str) -> None:
  """Refuses a state that the step's own `init` did not make."""
  if isinstance(given, kind):
    return
  needs = f"{step} needs a {kind.__name__} as its state, got a {type(given).__name__}:"
  if type(given).__name__ in ("dict", "list", "tuple"):
    raise TypeError(
      f"{needs} a checkpoint restored without its types. Restore it into the template"
      " jax.eval_shape(tx.init, params), or with"
      " flax.serialization.from_state_dict(tx.init(params), restored)."
    )
  raise TypeError(
    f"{needs} that of another transformation. Start with tx.init(params), and copy"
    " the fields to keep with _replace."
  )


def one_number(name: str, value: Any, otherwise: str) -> None:
  """Refuses what is not a single number."""
  if jnp.shape(value) != ():
    raise ValueError(
      f"{name} must be one number for a micro-batch, got shape"
      f" {list(jnp.shape(value))}; {otherwise}."
    )


def spelling(given: Iterable[str], known: Sequence[str], step: str) -> None:
  """Refuses names of extra args that are near to a known one."""
  for name in given:
    for meant in difflib.get_close_matches(name, known, 1, cutoff=0.8):
      raise TypeError(f"{step} got {name}=; did you mean {meant}=?")


_OF_A_MODEL = (
  " For a model, pass only its parameters: nnx.state(model, nnx.Param), or"
  " eqx.filter(model, eqx.is_inexact_array)."
)


def parameters(params: PyTree, step: str, *, copied: bool = False) -> None:
  """Refuses parameters that are no floating-point arrays.

  With `copied`, the step needs their values, and abstract arrays are refused.
  """
  plain = isinstance(params, (dict, list, tuple))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    where = f"params{jax.tree_util.keystr(path)}"
    _array(leaf, where, step, _OF_A_MODEL)
    if copied and isinstance(leaf, jax.ShapeDtypeStruct):
      raise TypeError(
        f"{step} copies the parameters, but {where} is abstract: for an abstract state,"
        " call jax.eval_shape(tx.init, params)."
      )
    if not (plain or jnp.issubdtype(leaf.dtype, jnp.inexact)):
      raise TypeError(
        f"{step} needs floating-point params, got {leaf.dtype} at {where}.{_OF_A_MODEL}"
      )
  inexact_leaves("params", params, step)


def same_tree(name: str, tree: PyTree, like: PyTree, step: str) -> None:
  """Refuses a tree whose arrays are not those of `like`, the step's parameters."""
  arrays(name, tree, step)
  expected, found = jax.tree.flatten(like), jax.tree.flatten(tree)
  shapes = lambda leaves: [jnp.shape(leaf) for leaf in leaves]
  if expected[1] == found[1] and shapes(expected[0]) == shapes(found[0]):
    return
  by_path = lambda tree: {
    jax.tree_util.keystr(path): list(jnp.shape(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  want, have = by_path(like), by_path(tree)
  for path in (*want, *have):
    if want.get(path) != have.get(path):
      if path not in have:
        problem = "is missing"
      elif path not in want:
        problem = "is not one of them"
      else:
        problem = f"has shape {have[path]}, not {want[path]}"
      raise ValueError(
        f"{step} needs {name} like the parameters that its init was given, but"
        f" {name}{path} {problem}."
      )


def arrays(name: str, tree: PyTree, step: str) -> None:
  """Refuses leaves that are no arrays, such as Python numbers and functions."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    _array(leaf, f"{name}{jax.tree_util.keystr(path)}", step)


def _array(leaf: Any, where: str, step: str, hint: str = "") -> None:
  if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
    return
  if isinstance(leaf, (bool, int, float, complex)):
    raise TypeError(
      f"{step} needs arrays, got the Python number {leaf!r} at {where}: convert it"
      f" with jnp.asarray({leaf!r})."
    )
  kind = "a function" if callable(leaf) else f"a {type(leaf).__name__}"
  raise TypeError(f"{step} needs arrays, got {kind} at {where}.{hint}")
