"""Linear steps, recognized and transposed: a step's transpose is weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ranger._core.gramian import Directions
from optax_ranger._core.sharding import vary
from optax_ranger._core.shards import axes_among
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree

_NOT_ONE_WEIGHT = (
  "the step is linear in the per-example gradients, but it is not one weight"
  " per example: it treats the parameters of one leaf, or of leaves of"
  " different shapes, differently (as optax.centralize after a mean does)."
  " Keep only per-example steps and aggregations in it, and chain the rest"
  " with the optimizer."
)


_NOT_ENTRYWISE = (
  "num_sweeps above 1 needs a step that treats every entry of the gradients"
  " alike, and by itself: aggregations do; clipping by a norm, or centralizing,"
  " does not. Chain that part with the optimizer."
)


class NotLinearError(TypeError):
  """The step is not linear in the per-example gradients, so it cannot be fused."""


def transpose(
  step: optax.GradientTransformationExtraArgs,
  n: int,
  state: PyTree,
  extra_args: dict[str, Any],
  dtype: Any = jnp.float32,
) -> Array:
  """The transpose of the step applied to one: the weights of the examples, [n]."""

  def weights_for(n, state, extra_args):
    apply = lambda leaf: step.update(leaf, state, None, **extra_args)[0]
    # Under shard_map the weights differ from device to device with their inputs.
    axes = axes_among(state, extra_args)
    leaf = vary(jnp.zeros([n], dtype), axes)
    try:
      result = jax.eval_shape(apply, leaf)  # Wrong use shows itself here.
    except (TypeError, ValueError) as error:
      if all(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(state)):
        raise
      raise ValueError(
        "the step failed on one leaf of shape [n]; if it keeps state of the"
        " parameters' shape (momentum, averages), chain that part with the"
        " optimizer instead."
      ) from error
    if getattr(result, "shape", None) != ():
      raise ValueError(
        "the step must end in an aggregation, such as aggregate_by_mean: it"
        f" turned a leaf of shape [{n}] into {result}."
      )
    try:
      one = vary(jnp.ones([], result.dtype), axes)
      (weights,) = jax.linear_transpose(apply, leaf)(one)
    except Exception as error:  # What is raised depends on the operation.
      raise NotLinearError(
        "the step is not linear in the per-example gradients, so it has no"
        " example weights; value_and_grad runs it on per-example gradients."
      ) from error
    return weights

  weights = weights_for(n, state, extra_args)
  with jax.ensure_compile_time_eval():
    _refuse_other_than_one_weight(
      step, n, weights_for, *_concrete_like((state, extra_args))
    )
  return weights


def _refuse_other_than_one_weight(
  step: optax.GradientTransformationExtraArgs,
  n: int,
  weights_for: Callable[..., Array],
  state: PyTree,
  extra_args: dict[str, Any],
) -> None:
  """Tries the step on random gradients of two shapes, against the weights.

  `linear_transpose` on one scalar leaf would accept a linear step that depends
  on shapes and lose it in silence, and the constant of an affine one as well.
  """
  draw = np.random.default_rng(0).standard_normal
  n = _known_size(n)
  probe = [draw([n]).astype(np.float32), draw([n, 2, 3]).astype(np.float32)]
  leaves, structure = jax.tree.flatten((state, extra_args))
  is_array = [isinstance(leaf, np.ndarray | jax.Array) for leaf in leaves]

  # One program: operation by operation, compiling them would take seconds.
  @jax.jit
  def trial(arrays, probe):
    given = iter(arrays)
    state, extra_args = structure.unflatten(
      next(given) if array else leaf
      for leaf, array in zip(leaves, is_array, strict=True)
    )
    result, _ = step.update(probe, state, None, **extra_args)
    return weights_for(n, state, extra_args), result

  arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
  try:
    weights, result = trial(arrays, probe)
  except (TypeError, ValueError) as error:
    raise ValueError(_NOT_ONE_WEIGHT) from error
  weights = np.asarray(weights)
  for leaf, found in zip(probe, map(np.asarray, jax.tree.leaves(result)), strict=True):
    expected = np.tensordot(weights, leaf, axes=1)
    room = 1e-4 * np.tensordot(np.abs(weights), np.abs(leaf), axes=1) + 1e-30
    if found.shape != expected.shape or (np.abs(found - expected) > room).any():
      raise ValueError(_NOT_ONE_WEIGHT)


def _concrete_like(tree: PyTree) -> PyTree:
  """Replaces traced arrays by concrete ones of the same shapes.

  Zeros and ones; tables of positions go round, as thousands of neighbors at one
  place would add up to a rounding error.
  """

  def concrete(leaf):
    if not isinstance(leaf, jax.core.Tracer):
      return leaf
    shape = tuple(map(_known_size, leaf.shape))
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jnp.broadcast_to(jax.random.key(0), shape)
    if jnp.issubdtype(leaf.dtype, jnp.integer) and len(shape) == 2 and all(shape):
      n, k = shape
      round_ = np.arange(1, n + 1)[:, None] + np.arange(k)
      return (round_ % n).astype(leaf.dtype)
    fill = 0 if jnp.issubdtype(leaf.dtype, jnp.integer) else 1
    return np.full(shape, fill, leaf.dtype)

  return jax.tree.map(concrete, tree)


def _known_size(size: Any) -> int:
  """A size to try with, where ``jax.export`` leaves it open."""
  return size if isinstance(size, int) else 8


def looks_at(
  step: optax.GradientTransformationExtraArgs,
  n: int,
  state: PyTree,
  extra_args: dict[str, Any],
) -> str | None:
  """What a step would like to know of whole members, if it is told.

  Returns:
    ``"gramian"``, ``"norms"``, ``"directions"``, or None. None also where it would
    like to know several: after a step that changes members they are others.
  """
  square, row = jnp.zeros([n, n], jnp.float32), jnp.ones([n], jnp.float32)
  facts = {"gramian": square, "norms": row, "directions": Directions(row, square)}
  found = [
    name
    for name, fact in facts.items()
    if uses(step, n, state, {**extra_args, name: fact}, name)
  ]
  return found[0] if len(found) == 1 else None


def uses(
  step: optax.GradientTransformationExtraArgs,
  n: int,
  state: PyTree,
  extra_args: dict[str, Any],
  name: str,
) -> bool:
  """Whether a step looks at the array that it is given as one of its extra args."""
  leaf = jnp.zeros([n], jnp.float32)
  apply = lambda array: step.update(leaf, state, None, **{**extra_args, name: array})
  traced = jax.make_jaxpr(apply)(extra_args[name]).jaxpr
  used = {id(variable) for equation in traced.eqns for variable in equation.invars}
  return any(id(variable) in used for variable in traced.invars)


def reads(
  step: optax.GradientTransformationExtraArgs,
  n: int,
  state: PyTree,
  extra_args: dict[str, Any],
  rows: dict[str, Any],
) -> dict[str, Any]:
  """Which of the arrays in `rows`, given as extra args, a step looks at."""
  others = {name: arg for name, arg in extra_args.items() if name not in rows}
  # One leaf of shape [n], as in a fusion.
  apply = lambda rows: step.update(
    jnp.zeros([n], jnp.float32), state, None, **{**others, **rows}
  )
  jaxpr = jax.make_jaxpr(apply)(rows).jaxpr
  used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
  structure = jax.tree.structure(rows)
  return structure.unflatten(id(variable) in used for variable in jaxpr.invars)


def has_forward_mode(push: Callable[[PyTree], Any], params: PyTree) -> bool:
  """Whether a linearized function can be applied to tangents.

  What goes through ``jax.custom_vjp`` can't, and JAX says so only when it compiles.
  """

  def has_none(jaxpr) -> bool:
    is_jaxpr = lambda node: hasattr(node, "eqns") or hasattr(node, "jaxpr")
    for equation in jaxpr.eqns:
      inner = filter(is_jaxpr, jax.tree.leaves(equation.params, is_leaf=is_jaxpr))
      if equation.primitive.name == "custom_lin" or any(
        has_none(getattr(node, "jaxpr", node)) for node in inner
      ):
        return True
    return False

  return not has_none(jax.make_jaxpr(push)(params).jaxpr)


def refuse_unless_entrywise(
  step: optax.GradientTransformationExtraArgs,
  n: int,
  state: PyTree,
  extra_args: dict[str, Any],
  message: str = _NOT_ENTRYWISE,
) -> None:
  """Refuses a step whose result for one entry depends on others, or on shapes."""
  with jax.ensure_compile_time_eval():
    state, extra_args = _concrete_like((state, extra_args))
    draw = np.random.default_rng(0).standard_normal([n, 4, 3]).astype(np.float32)
    flat = draw.reshape(n, 12)

    def update(rows):
      result, _ = step.update([jnp.asarray(rows)], state, None, **extra_args)
      return np.asarray(jax.tree.leaves(result)[0])

    try:
      whole = update(draw).ravel()
      parts = np.concatenate([update(flat[:, :5]), update(flat[:, 5:])])
    except (TypeError, ValueError) as error:
      raise ValueError(message) from error
  room = 1e-4 * np.abs(whole).max(initial=0)
  if parts.shape != whole.shape or (np.abs(parts - whole) > room).any():
    raise ValueError(message)
