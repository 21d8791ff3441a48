"""Linear steps in one backward pass: a step's transpose is one weight per example."""

from collections.abc import Callable
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ranger import _members
from optax_ranger import _numerics
from optax_ranger import _tree
from optax_ranger import _types
from optax_ranger import _validate

_NOT_ONE_WEIGHT = (
  "the step is linear in the per-example gradients, but it is not one weight"
  " per example: it treats the parameters of one leaf, or of leaves of"
  " different shapes, unlike each other (optax.centralize after a mean does)."
  " Keep only per-example steps and aggregations in it, and chain the rest"
  " with the optimizer."
)


class NotLinearError(TypeError):
  """The step is not linear in the per-example gradients, so it cannot be fused."""


def example_weights(
  step: optax.GradientTransformation,
  n: int,
  *,
  state: _types.PyTree = None,
  **extra_args: Any,
) -> _types.Array:
  r"""Computes the weight that each of n examples has in the result of a step.

  For a training loop of your own: with these weights, ``(weights *
  losses).sum()`` has the gradient that `step` would make of the per-example
  gradients, for the price of one ordinary backward pass.

  .. math:: L(g_1, \dots, g_n) = \sum_i c_i g_i, \qquad c = L^T 1

  Args:
    step: per-example steps that end in an aggregation, alone or chained.
    n: the number of examples.
    state: the step's state; None for a fresh one.
    **extra_args: what the step needs: ``neighbors=``, ``member_weights=``,
      ``regions=``.

  Returns:
    ``float32 [n]``. Examples of ``member_weights`` zero have weight zero.

  Guarantees:
    * The weighted loss has the gradient of the per-example form
      (``test_fused_equals_per_example``).
    * A step that is linear but not one weight per example is refused, where
      that shows on leaves of shape ``[n]`` and ``[n, 2, 3]``
      (``test_shape_dependent_step_is_refused``). It cannot show for a mask by
      the parameters' names: chain such a step with the optimizer.

  Raises:
    NotLinearError: a ``TypeError``, for steps such as ``aggregate_by_max``.
    ValueError: for steps that are not one weight per example, that do not end
      in an aggregation, or that keep state of the parameters' shape.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> ranger.example_weights(
    ...     ranger.aggregate_by_mean(), 4, member_weights=jnp.array([1, 1, 2, 0])
    ... ).tolist()
    [0.25, 0.25, 0.5, 0.0]
  """
  _validate.static_count("n", n, least=0)
  step = optax.with_extra_args_support(step)
  if state is None:
    state = step.init(jnp.zeros([], jnp.float32))
  clean, _, num_dropped = _members.clean_weights(
    extra_args.pop("member_weights", None), n
  )
  extra_args.update(member_weights=clean, num_dropped=num_dropped)
  return _transpose(step, n, state, extra_args)


def value_and_grad(
  per_example_losses: Callable[..., Any],
  step: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  micro_batch_size: int = 32,
) -> Callable[..., Any]:
  r"""Differentiates the losses of a batch through a step over per-example gradients.

  A linear step (neighbor averaging, means, sums, regions; alone or chained)
  costs one ordinary backward pass and no per-example gradients. Any other step
  runs on per-example gradients, computed in micro-batches; that takes memory of
  n times the parameters.

  Args:
    per_example_losses: ``(params, batch, **extra_args) -> losses [n]``, or
      ``(losses, aux)``. It gets those extra args that its signature names, or
      all of them if it takes ``**kwargs``. Example i's loss may depend on
      example i only; what else it sees of the batch (batch normalization) is
      exact in the fused form only.
    step: per-example steps that end in an aggregation, alone or chained.
    has_aux: whether the losses come with a second result.
    micro_batch_size: examples whose gradients are computed at once when the
      step is not linear.

  Returns:
    A function ``(params, batch, *, state=None, **extra_args) -> (value,
    grads)``, or ``(value, grads, new_state)`` when a state of `step` is passed.
    ``value`` is ``losses [n]``, or ``(losses, aux)``; ``grads`` is like
    ``params``. The step gets ``losses=`` beside the extra args. Extra args
    that the losses see and whose leaves all have leading axis n are taken to
    hold one row an example.

    Every leaf of ``batch`` has leading axis n. An example with an input or a
    loss that is not finite is replaced by another one and has weight zero; the
    step's ``num_dropped`` counts it.

  Guarantees:
    * Linear or not, the gradient is the step's on per-example gradients
      (``test_fused_equals_per_example``, ``test_non_linear_runs_per_example``).
    * An example that is not finite changes nothing but a counter
      (``test_bad_example_is_left_out``).
    * Memory of a linear step is that of the plain mean
      (``test_fused_holds_no_per_example_gradients``).

  Raises:
    ValueError: for a step that is not one weight per example, batches whose
      leaves differ in their leading axis, losses that are not a vector [n].

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> losses = lambda w, batch: (w * batch["x"] - batch["y"]) ** 2
    >>> grad_fn = ranger.value_and_grad(losses, ranger.aggregate_by_mean())
    >>> batch = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([1.0, jnp.nan])}
    >>> value, grad = grad_fn(jnp.array(2.0), batch)
    >>> print(grad)  # the second example is left out: 2 (2 - 1)
    2.0
  """
  _validate.static_count("micro_batch_size", micro_batch_size)
  step = optax.with_extra_args_support(step)
  accepts = _accepted_names(per_example_losses)

  def function(
    params: _types.PyTree,
    batch: _types.PyTree,
    *,
    state: _types.PyTree = None,
    **extra_args: Any,
  ) -> Any:
    n = _validate.leading_axis("batch", batch)
    if n is None:
      raise ValueError("batch must hold at least one array, got none.")
    finite = _tree.finite_rows(batch, n)
    batch = jax.tree.map(lambda leaf: _stand_in_rows(finite, leaf), batch)
    seen = {name: arg for name, arg in extra_args.items() if accepts(name)}

    def losses_and_aux(params, batch, seen):
      result = per_example_losses(params, batch, **seen)
      losses, aux = result if has_aux else (result, None)
      return losses.astype(_numerics.wide(losses.dtype)), aux

    losses, pull_back, aux = jax.vjp(
      lambda params: losses_and_aux(params, batch, seen), params, has_aux=True
    )
    _validate.shape("the value of per_example_losses", losses, (n,))
    finite = jnp.logical_and(finite, _numerics.replicate(jnp.isfinite(losses)))

    def step_args(finite):
      weights, _, num_dropped = _members.clean_weights(
        extra_args.get("member_weights"), n, finite=finite
      )
      own = {"member_weights": weights, "num_dropped": num_dropped}
      return {**extra_args, "losses": losses, **own}

    step_state = step.init(params) if state is None else state
    try:
      weights = _transpose(step, n, step_state, step_args(finite))
    except NotLinearError:
      per_example = _per_example_gradients(
        lambda params, batch, seen: losses_and_aux(params, batch, seen)[0],
        params,
        batch,
        seen,
        micro_batch_size,
      )
      finite = jnp.logical_and(finite, _tree.finite_rows(per_example, n))
      grads, new_state = step.update(
        _keep_rows(finite, per_example), step_state, params, **step_args(finite)
      )
    else:
      (grads,) = pull_back(_numerics.per_row(weights.astype(losses.dtype), losses))
      _, new_state = step.update(
        jnp.zeros([n], jnp.float32), step_state, None, **step_args(finite)
      )
    value = (losses, aux) if has_aux else losses
    return (value, grads) if state is None else (value, grads, new_state)

  return function


def _transpose(
  step: optax.GradientTransformationExtraArgs,
  n: int,
  state: _types.PyTree,
  extra_args: dict[str, Any],
) -> _types.Array:
  """The transpose of the step applied to one: the weights of the examples, [n]."""

  def weights_for(state, extra_args):
    apply = lambda leaf: step.update(leaf, state, None, **extra_args)[0]
    # Under shard_map the weights differ from device to device with their inputs.
    axes = frozenset().union(*map(_numerics.varying_axes, _arrays(state, extra_args)))
    leaf = _numerics.vary(jnp.zeros([n], jnp.float32), axes)
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
      one = _numerics.vary(jnp.ones([], result.dtype), axes)
      (weights,) = jax.linear_transpose(apply, leaf)(one)
    except Exception as error:  # What is raised depends on the operation.
      raise NotLinearError(
        "the step is not linear in the per-example gradients, so it has no"
        " example weights; value_and_grad runs it on per-example gradients."
      ) from error
    return weights

  weights = weights_for(state, extra_args)
  with jax.ensure_compile_time_eval():
    state, extra_args = _stand_in((state, extra_args))
    _refuse_other_than_one_weight(
      step, state, extra_args, np.asarray(weights_for(state, extra_args))
    )
  return weights


def _arrays(*trees: Any) -> list[Any]:
  leaves = jax.tree.leaves(trees)
  return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]


def _refuse_other_than_one_weight(
  step: optax.GradientTransformationExtraArgs,
  state: _types.PyTree,
  extra_args: dict[str, Any],
  weights: np.ndarray,
) -> None:
  """Tries the step on random gradients of two shapes, against the weights.

  `linear_transpose` on one scalar leaf would accept a linear step that depends
  on shapes and lose it in silence, and the constant of an affine one as well.
  """
  n = weights.shape[0]
  draw = np.random.default_rng(0).standard_normal
  probe = [draw([n]).astype(np.float32), draw([n, 2, 3]).astype(np.float32)]
  try:
    result, _ = step.update(jax.tree.map(jnp.asarray, probe), state, None, **extra_args)
  except (TypeError, ValueError) as error:
    raise ValueError(_NOT_ONE_WEIGHT) from error
  for leaf, found in zip(probe, map(np.asarray, jax.tree.leaves(result)), strict=True):
    expected = np.tensordot(weights, leaf, axes=1)
    room = 1e-4 * np.tensordot(np.abs(weights), np.abs(leaf), axes=1) + 1e-30
    if found.shape != expected.shape or (np.abs(found - expected) > room).any():
      raise ValueError(_NOT_ONE_WEIGHT)


def _stand_in(tree: _types.PyTree) -> _types.PyTree:
  """Replaces traced arrays by concrete ones of the same shapes: zeros and ones."""

  def concrete(leaf):
    if not isinstance(leaf, jax.core.Tracer):
      return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    fill = 0 if jnp.issubdtype(leaf.dtype, jnp.integer) else 1
    return jnp.full(leaf.shape, fill, leaf.dtype)

  return jax.tree.map(concrete, tree)


def _per_example_gradients(
  losses_of: Callable[..., Any],
  params: _types.PyTree,
  batch: _types.PyTree,
  seen: dict[str, Any],
  micro_batch_size: int,
) -> _types.PyTree:
  """Gradients of each example's loss, leaves [n, *shape], in micro-batches."""
  n = jax.tree.leaves(batch)[0].shape[0]

  def has_rows(arg):
    leaves = jax.tree.leaves(arg)
    return bool(leaves) and all(jnp.shape(leaf)[:1] == (n,) for leaf in leaves)

  by_row = {name: arg for name, arg in seen.items() if has_rows(arg)}
  shared = {name: arg for name, arg in seen.items() if name not in by_row}

  def one_example(rows):
    batch, by_row = jax.tree.map(lambda row: jnp.asarray(row)[None], rows)
    loss = lambda params: losses_of(params, batch, {**shared, **by_row})[0]
    return jax.grad(loss)(params)

  return jax.lax.map(one_example, (batch, by_row), batch_size=micro_batch_size)


def _stand_in_rows(finite: _types.Array, leaf: Any) -> _types.Array:
  """Puts the first finite row where rows are not finite; zeros if there is none.

  Zeros alone won't do: a norm or a logarithm has no gradient there, and a weight
  of zero does not undo that.
  """
  leaf = jnp.asarray(leaf)
  if leaf.shape[0] and not _numerics.is_sharded(leaf):
    first = jnp.argmax(finite)
    row = jnp.where(finite[first], leaf[first], jnp.zeros_like(leaf[0]))
    return jnp.where(_numerics.per_row(finite, leaf), leaf, row[None])
  return _members.keep_rows(finite, leaf)


def _keep_rows(keep: _types.Array, tree: _types.PyTree) -> _types.PyTree:
  return jax.tree.map(lambda leaf: _members.keep_rows(keep, leaf), tree)


def _accepted_names(function: Callable[..., Any]) -> Callable[[str], bool]:
  """Which keywords a function takes."""
  parameters = inspect.signature(function).parameters.values()
  if any(one.kind is one.VAR_KEYWORD for one in parameters):
    return lambda name: True
  names = {one.name for one in parameters if one.kind is not one.VAR_POSITIONAL}
  return lambda name: name in names
