"""Linear steps in one backward pass: a step's transpose is one weight per example."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import gramian as gramian_lib
from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.members import clean_weights
from optax_ranger._core.members import keep_rows
from optax_ranger._core.sharding import is_sharded
from optax_ranger._core.sharding import per_row
from optax_ranger._core.sharding import replicate
from optax_ranger._core.sharding import vary
from optax_ranger._core.sharding import varying_axes
from optax_ranger._core.shards import AxisName
from optax_ranger._core.shards import Shards
from optax_ranger._core.tree import finite_rows
from optax_ranger._core.types import Array
from optax_ranger._core.types import Neighbors
from optax_ranger._core.types import PyTree
from optax_ranger._gradients import arguments
from optax_ranger._gradients import linear
from optax_ranger._gradients import micro_batches
from optax_ranger._gradients import per_example

_NOT_OVER_DEVICES = (
  "the step is not linear in the per-example gradients, which never leave their"
  " device: aggregate examples by a mean, and devices with across_devices."
)


def example_weights(
  step: optax.GradientTransformation,
  n: int,
  *,
  state: PyTree = None,
  **extra_args: Any,
) -> Array:
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
  validate.static_count("n", n, least=0)
  step = optax.with_extra_args_support(step)
  if state is None:
    state = step.init(jnp.zeros([], jnp.float32))
  clean, _, num_dropped = clean_weights(extra_args.pop("member_weights", None), n)
  extra_args.update(member_weights=clean, num_dropped=num_dropped)
  return linear.transpose(step, n, state, extra_args)


def value_and_grad(
  per_example_losses: Callable[..., Any],
  step: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  micro_batch_size: int = 32,
  num_sweeps: int = 1,
  axis_name: AxisName = None,
) -> Callable[..., Any]:
  r"""Differentiates the losses of a batch through a step over per-example gradients.

  A linear step (neighbor averaging, means, sums, regions; alone or chained)
  costs one ordinary backward pass and no per-example gradients. Any other step
  runs on per-example gradients, computed in micro-batches. It needs all examples
  of an entry at once, but not all entries: `num_sweeps` buys memory with time.

  ========================================= ==================== ===============
  step                                      times the parameters backward passes
  ========================================= ==================== ===============
  linear                                    1                    1
  any other                                 2 n to 4 n           1
  entry by entry, in s sweeps: maximum,     m, or 3 n / s        s + 1
  median, trimmed mean, regions of maxima   if that is more
  Krum, geometric median, in s sweeps       2 m, or 2 n / s      s + 2
                                            if that is more
  ========================================= ==================== ===============

  (n examples, micro-batches of m.) The median of a stream needs either all of its
  values or several passes over it, and so do the others, whatever the method.

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
    num_sweeps: how often they are computed, when the step is not linear; each
      time 1 / num_sweeps of every leaf is kept. A static Python integer.
    axis_name: inside ``jax.shard_map`` or ``jax.pmap``, the mesh axis, or axes,
      over which devices hold rows of the batch. The step then sees the rows of
      all devices (what it needs is gathered, never gradients), and one ``psum``
      adds up the gradient. Linear steps only. None: the batch is all there is.

  Returns:
    A function ``(params, batch, *, state=None, **extra_args) -> (value,
    grads)``, or ``(value, grads, new_state)`` when a state of `step` is passed.
    ``value`` is ``losses [n]``, or ``(losses, aux)``; ``grads`` is like
    ``params``. The step gets ``losses=`` beside the extra args. Extra args
    that the losses see and whose leaves all have leading axis n are taken to
    hold one row an example. With `axis_name`, ``neighbors=``,
    ``member_weights=``, ``regions=`` and what else differs from device to device
    hold this device's rows; neighbors are positions among the rows of all.

    Every leaf of ``batch`` has leading axis n. An example with an input or a
    loss that is not finite is replaced by another one and has weight zero; the
    step's ``num_dropped`` counts it.

  Guarantees:
    * Linear or not, the gradient is the step's on per-example gradients
      (``test_fused_equals_per_example``, ``test_non_linear_runs_per_example``).
    * An example that is not finite changes nothing but a counter
      (``test_bad_example_is_left_out``), also where the loss has no gradient at
      zero (``test_bad_example_is_left_out_of_a_singular_loss``).
    * Memory of a linear step is that of the plain mean
      (``test_fused_holds_no_per_example_gradients``).
    * Split over devices, it is the gradient of the whole batch
      (``test_a_split_batch_has_the_gradient_of_the_whole``).
    * Sweeps change nothing but time and memory
      (``test_sweeps_change_nothing``), which follows the micro-batch
      (``test_memory_follows_the_micro_batch``).

  Raises:
    ValueError: for a step that is not one weight per example, or, in several
      sweeps, not entry by entry (clipping by a norm), batches whose
      leaves differ in their leading axis, losses that are not a vector [n], and
      for a step that is not linear with `axis_name`, or under ``jax.shard_map``
      when the parameters are the same on all devices and the batch is not.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> losses = lambda w, batch: (w * batch["x"] - batch["y"]) ** 2
    >>> grad_fn = ranger.value_and_grad(losses, ranger.aggregate_by_mean())
    >>> batch = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([1.0, jnp.nan])}
    >>> value, grad = grad_fn(jnp.array(2.0), batch)
    >>> print(grad)  # the second example is left out: 2 (2 - 1)
    2.0
  """
  gradient = gradient_of(
    per_example_losses,
    step,
    has_aux=has_aux,
    micro_batch_size=micro_batch_size,
    num_sweeps=num_sweeps,
    axis_name=axis_name,
  )

  def function(
    params: PyTree,
    batch: PyTree,
    *,
    state: PyTree = None,
    **extra_args: Any,
  ) -> Any:
    losses, aux, grads, new_state, *_ = gradient(params, batch, state, extra_args)
    value = (losses, aux) if has_aux else losses
    return (value, grads) if state is None else (value, grads, new_state)

  return function


def gradient_of(
  per_example_losses: Callable[..., Any],
  step: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  micro_batch_size: int = 32,
  num_sweeps: int = 1,
  num_micro_batches: int = 1,
  axis_name: AxisName = None,
  find_neighbors: Callable[..., Neighbors] | None = None,
  reduce: Callable[[PyTree], PyTree] | None = None,
  is_mean: bool = False,
  meet: tuple[str, ...] = (),
) -> Callable[..., tuple[Any, ...]]:
  """What ``value_and_grad`` and ``train_step`` have in common.

  With `is_mean`, `step` is known to be ``aggregate_by_mean``, whose divisor may
  come after the sum over devices: nothing needs to be gathered for it.

  Returns:
    ``(params, batch, state, extra_args) -> (losses, aux, grads, new_state,
    finite, met)``; `finite` tells which of this device's examples are, and `met`
    are the items of aux that `meet` names, of all devices, where they came along.
  """
  validate.static_count("micro_batch_size", micro_batch_size)
  validate.static_count("num_sweeps", num_sweeps)
  step = optax.with_extra_args_support(step)
  accepts = arguments.accepted_names(per_example_losses)

  def losses_and_aux(params, batch, seen):
    result = per_example_losses(params, batch, **seen)
    losses, aux = result if has_aux else (result, None)
    return losses.astype(numerics.wide(losses.dtype)), aux

  def function(params, batch, state, extra_args):
    n = validate.leading_axis("batch", batch)
    if n is None:
      raise ValueError("batch must hold at least one array, got none.")
    shards = Shards(axis_name, n)
    params = shards.vary(params)
    finite = finite_rows(batch, n)
    batch = jax.tree.map(lambda leaf: _stand_in_rows(finite, leaf), batch)
    seen = {name: arg for name, arg in extra_args.items() if accepts(name)}
    step_state = step.init(params) if state is None else state
    if is_mean:
      return _mean_gradient(
        losses_and_aux, step, step_state, shards, params, batch, seen,
        finite, extra_args.get("member_weights"), num_micro_batches, reduce,
      )  # fmt: skip
    gathered = arguments.Gathered(
      shards, step, step_state, batch, extra_args, find_neighbors, meet
    )
    step_args = gathered.args
    if num_micro_batches > 1:
      call = functools.partial(losses_and_aux, params)
      losses, aux = None, None
      first = arguments.needs_values(find_neighbors, batch, extra_args)
      first = first or linear.uses(
        step, shards.total, step_state, step_args(finite, None, None), "losses"
      )
      if first:
        losses, aux = micro_batches.values(call, batch, seen, num_micro_batches)
        finite = jnp.logical_and(finite, jnp.isfinite(losses))
      args = step_args(finite, losses, aux)
      weights = linear.transpose(step, shards.total, step_state, args)
      losses, aux, grads = micro_batches.gradient(
        losses_and_aux, params, batch, seen, shards.own(weights), num_micro_batches
      )
      if not first:
        finite = jnp.logical_and(finite, jnp.isfinite(losses))
        args = step_args(finite, losses, aux)
    else:
      losses, pull_back, aux = jax.vjp(
        lambda params: losses_and_aux(params, batch, seen), params, has_aux=True
      )
      validate.shape("the value of per_example_losses", losses, (n,))
      finite = jnp.logical_and(finite, replicate(jnp.isfinite(losses)))
      args = step_args(finite, losses, aux)
      try:
        weights = linear.transpose(step, shards.total, step_state, args)
      except linear.NotLinearError as error:
        if axis_name is not None:
          raise ValueError(_NOT_OVER_DEVICES) from error
        losses_only = lambda params, batch, seen: losses_and_aux(params, batch, seen)[0]

        def weighted(weights, finite):
          # Weights of zero keep nothing out that is not finite: other rows do.
          rows = jax.tree.map(lambda leaf: _stand_in_rows(finite, leaf), batch)
          losses, pull_back = jax.vjp(lambda p: losses_only(p, rows, seen), params)
          return pull_back(per_row(weights.astype(losses.dtype), losses))[0]

        sweep = per_example.gradients_of(
          losses_only, params, batch, seen, micro_batch_size
        )
        again = lambda finite: step_args(finite, losses, aux)
        grads, new_state = _run_apart(
          step, step_state, params, finite, again, sweep, num_sweeps, weighted
        )
        return losses, aux, grads, new_state, finite, {}
      weights = shards.own(weights).astype(losses.dtype)
      (grads,) = pull_back(per_row(weights, losses))
    grads = (reduce or shards.sum)(grads)
    leaf = jnp.zeros([shards.total], jnp.float32)
    _, new_state = step.update(leaf, step_state, None, **args)
    return losses, aux, grads, new_state, finite, gathered.met

  return function


def _mean_gradient(
  losses_and_aux, step, state, shards, params, batch, seen,
  finite, member_weights, num_micro_batches, reduce,
) -> tuple[Any, ...]:  # fmt: skip
  """The weighted mean over the examples of all devices, divided at the end."""
  asked, _, _ = clean_weights(member_weights, shards.n)
  weights = jnp.where(finite, asked, jnp.zeros_like(asked)) / shards.total
  if num_micro_batches > 1:
    losses, aux, grads = micro_batches.gradient(
      losses_and_aux, params, batch, seen, weights, num_micro_batches
    )
    good = jnp.isfinite(losses)
  else:
    losses, pull_back, aux = jax.vjp(
      lambda params: losses_and_aux(params, batch, seen), params, has_aux=True
    )
    validate.shape("the value of per_example_losses", losses, (shards.n,))
    good = replicate(jnp.isfinite(losses))
    kept = jnp.where(good, weights, jnp.zeros_like(weights)).astype(losses.dtype)
    (grads,) = pull_back(per_row(kept, losses))
  finite = jnp.logical_and(finite, good)
  weight = jnp.where(finite, weights, jnp.zeros_like(weights)).sum()
  dropped = jnp.logical_and(asked > 0, jnp.logical_not(finite)).sum(dtype=weight.dtype)
  if reduce is None:
    grads, weight, dropped = shards.sum((grads, weight, dropped))
  else:
    grads, (weight, dropped) = reduce(grads), shards.sum((weight, dropped))
  scale = lambda leaf: numerics.divide(leaf, weight.astype(numerics.real(leaf.dtype)))
  grads = jax.tree.map(scale, grads)
  _, new_state = step.update(
    jnp.zeros([shards.n]),
    state,
    None,
    member_weights=jnp.ones([shards.n]),
    num_dropped=dropped.astype(jnp.int32),
  )
  return losses, aux, grads, new_state, finite, {}


def _run_apart(
  step: optax.GradientTransformationExtraArgs,
  state: PyTree,
  params: PyTree,
  finite: Array,
  step_args: Callable[..., dict[str, Any]],
  sweep: Callable[..., Any],
  num_sweeps: int,
  weighted: Callable[..., PyTree],
) -> tuple[PyTree, PyTree]:
  """The result and state of a step that is not linear, on per-example gradients."""
  n = finite.shape[0]
  if num_sweeps == 1:
    gradients = sweep(lambda gradient: gradient)
    finite = jnp.logical_and(finite, finite_rows(gradients, n))
    kept = jax.tree.map(lambda leaf: keep_rows(finite, leaf), gradients)
    return step.update(kept, state, params, **step_args(finite))
  finite_gradients, sizes = per_example.finite_and_sizes(sweep)
  finite = jnp.logical_and(finite, finite_gradients)
  args = step_args(finite)
  if linear.uses_gramian(step, n, state, args):
    frame = gramian_lib.frame(sizes, args["member_weights"])
    too_far = jnp.logical_and(args["member_weights"] > 0, frame.weights == 0)
    finite = jnp.logical_and(finite, jnp.logical_not(too_far))
    args = step_args(finite)
    args["gramian"] = per_example.gramian_in_sweeps(sweep, params, frame, num_sweeps)
    try:
      weights = linear.transpose(step, n, state, args)
    except linear.NotLinearError:
      pass
    else:
      leaf = vary(jnp.zeros([n]), varying_axes(weights))
      _, new_state = step.update(leaf, state, None, **args)
      return weighted(weights, finite), new_state
  return per_example.update_in_sweeps(
    sweep, step, state, params, finite, args, num_sweeps
  )


def _stand_in_rows(finite: Array, leaf: Any) -> Array:
  """Puts the first finite row where rows are not finite; zeros if there is none.

  Zeros alone won't do: a norm or a logarithm has no gradient there, and a weight
  of zero does not undo that.
  """
  leaf = jnp.asarray(leaf)
  if leaf.shape[0] and not is_sharded(leaf):
    first = jnp.argmax(finite)
    row = jnp.where(finite[first], leaf[first], jnp.zeros_like(leaf[0]))
    return jnp.where(per_row(finite, leaf), leaf, row[None])
  return keep_rows(finite, leaf)
