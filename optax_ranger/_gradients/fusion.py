"""Linear steps in one backward pass: a step's transpose is one weight per example."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.members import MemberState
from optax_ranger._core.members import clean_weights
from optax_ranger._core.members import init_members
from optax_ranger._core.shards import AxisName
from optax_ranger._core.shards import Shards
from optax_ranger._core.tree import finite_rows
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._gradients import arguments
from optax_ranger._gradients import evaluated as ways
from optax_ranger._gradients import linear
from optax_ranger._gradients import per_example
from optax_ranger._gradients import tasks
from optax_ranger._gradients.evaluated import Evaluated
from optax_ranger._gradients.evaluated import Problem
from optax_ranger._gradients.options import Options
from optax_ranger._gradients.told import Told

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
    ``float32 [n]``, or ``float64`` where that is enabled. Examples of
    ``member_weights`` zero have weight zero.

  Guarantees:
    * The weighted loss has the gradient of the per-example form.
    * A linear step that is not one weight per example is refused if leaves of shape
      ``[n]`` and ``[n, 2, 3]`` reveal it. They don't reveal a mask by parameter names:
      chain such a step with the optimizer.

  Raises:
    NotLinearError: a ``TypeError``, for steps such as ``aggregate_by_max``.
    ValueError: for steps that are not one weight per example, that do not end
      in an aggregation, or that keep state of the parameters' shape.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> weights = jax.jit(lambda given: ranger.example_weights(
    ...     ranger.aggregate_by_mean(), 4, member_weights=given))
    >>> weights(jnp.array([1, 1, 2, 0])).tolist()
    [0.25, 0.25, 0.5, 0.0]
  """
  validate.static_count("n", n, least=0)
  step = optax.with_extra_args_support(step)
  if state is None:
    state = step.init(jnp.zeros([], jnp.float32))
  dtype = jnp.result_type(float)
  clean, _, num_dropped = clean_weights(
    extra_args.pop("member_weights", None), n, dtype
  )
  extra_args.update(Told(clean, num_dropped).args())
  return linear.transpose(step, n, state, extra_args, dtype)


def value_and_grad(
  per_example_losses: Callable[..., Any],
  step: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  micro_batch_size: int = 32,
  num_sweeps: int = 1,
  axis_name: AxisName = None,
  row_args: tuple[str, ...] = (),
  over: str = "examples",
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
  Krum, geometric median, UPGrad, MGDA,     2 m, or 2 n / s      s + 2
  CAGrad, in s sweeps                       if that is more
  clipping by norms, then a linear one      m                    2
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
    row_args: names of extra args that hold one row an example, besides
      ``neighbors``, ``member_weights``, ``regions``, ``example_ids``,
      ``features``, ``labels``, ``beliefs`` and ``smoothed``.
    over: ``"examples"``, or ``"tasks"``: the losses are those of tasks, ``[T]``, and
      not of rows. `step` is then over tasks, ``member_weights`` has length T, and
      the batch is any tree: nothing of it is checked, and it is not cut.
      `micro_batch_size` is the number of tasks whose gradients are computed at once.
      UPGrad, MGDA and CAGrad hold one at a time, and take T + 1 backward passes and T
      passes in forward mode, whatever `num_sweeps`; losses that use
      ``jax.custom_vjp`` have none, so for them the gradients are held as for examples.
      A task whose loss is not finite has weight zero; if the gradient is not finite
      all the same, since tasks share what isn't, it is zero, and all tasks count as
      dropped.

  Returns:
    A function ``(params, batch, *, state=None, **extra_args) -> (value,
    grads)``, or ``(value, grads, new_state)`` when a state of `step` is passed.
    ``value`` is ``losses [n]``, or ``(losses, aux)``; ``grads`` is like
    ``params``. The step gets ``losses=`` beside the extra args. With
    `axis_name`, extra args with rows hold this device's rows; neighbors are
    positions among the rows of all.

    Gradients are those of ``jax.grad``: of complex parameters, the conjugate of
    the direction of steepest ascent.

    Every leaf of ``batch`` has leading axis n. An example with an input or a loss
    that is not finite has weight zero, and the step's ``num_dropped`` counts it. A
    bad input is replaced by another example's. If the derivative of a bad loss is
    not finite either, as of the square root of a negative number, it ruins the
    backward pass of a linear step: then no example of this device is usable. A good
    loss whose derivative is not finite, as of sqrt(x^2) at zero, makes the gradient
    of a linear step NaN, as everywhere in JAX; ``skip_nonfinite`` skips it.
    Without any usable example the gradient is zero; to leave the optimizer alone
    then, compare the counter with the number of examples, or use ``train_step``.

  Guarantees:
    * The gradient is that of the step on per-example gradients, for linear steps and
      others.
    * A non-finite example changes only a counter, also if the loss has no gradient at
      zero.
    * A linear step needs the memory of the plain mean.

  Raises:
    ValueError: for a step that is not one weight per example, or, in several
      sweeps, not entry by entry (clipping by a norm), batches whose
      leaves differ in their leading axis, losses that are not a vector [n], and
      for a step that is not linear with `axis_name`, or under ``jax.shard_map``
      when the parameters are the same on all devices and the batch is not.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> losses = lambda w, batch: (w * batch["x"] - batch["y"]) ** 2
    >>> grad_fn = jax.jit(ranger.value_and_grad(losses, ranger.aggregate_by_mean()))
    >>> batch = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([1.0, jnp.nan])}
    >>> value, grad = grad_fn(jnp.array(2.0), batch)
    >>> print(grad)  # the second example is left out: 2 (2 - 1)
    2.0
  """
  gradient = gradient_of(
    per_example_losses,
    step,
    Options(
      has_aux=has_aux,
      micro_batch_size=micro_batch_size,
      num_sweeps=num_sweeps,
      axis_name=axis_name,
      row_args=row_args,
      tasks=_is_over_tasks(over, axis_name=axis_name),
    ),
  )

  def function(
    params: PyTree, batch: PyTree, *, state: PyTree = None, **extra_args: Any
  ) -> Any:
    try:
      found, new_state, _, _ = gradient(params, batch, state, extra_args)
    except validate.MissingError as error:
      raise error.when_calling("grad_fn(params, batch") from None
    value = (found.losses, found.aux) if has_aux else found.losses
    return (value, found.grads) if state is None else (value, found.grads, new_state)

  declared: Any = function
  # For micro_batched: losses hold rows.
  rows = None if over == "tasks" else 0
  declared.value_axes = (rows, None) if has_aux else rows
  return declared


class Differentiated(NamedTuple):
  """What the engine returns.

  Attributes:
    evaluated: losses, aux and gradient; the gradient is that of all devices.
    state: of the step over examples.
    along: items of aux of all devices, those that were wanted and came along.
    divisor: what the gradient is still to be divided by, where it is first used: by
      itself, that would be one more pass over it. None for nothing.
  """

  evaluated: Evaluated
  state: PyTree
  along: dict[str, Any]
  divisor: Array | None = None


def gradient_of(
  per_example_losses: Callable[..., Any],
  step: optax.GradientTransformation | None,
  options: Options,
) -> Callable[..., Differentiated]:
  """What ``value_and_grad`` and ``train_step`` have in common.

  Args:
    per_example_losses: as in ``value_and_grad``.
    step: over the examples; None for the weighted mean, whose divisor may come after
      the sum over devices: nothing needs to be gathered for it.
    options: see there.

  Returns:
    ``(params, batch, state, extra_args, for_losses={}) -> Differentiated``. What is in
    `for_losses` reaches the losses only, in place of extra args of the same name.
  """
  validate.static_count("micro_batch_size", options.micro_batch_size)
  validate.static_count("num_sweeps", options.num_sweeps)
  accepts = arguments.accepted_names(per_example_losses)

  def losses_and_aux(params, batch, seen):
    result = per_example_losses(params, batch, **seen)
    losses, aux = result if options.has_aux else (result, None)
    return losses.astype(numerics.wide(losses.dtype)), aux

  def function(params, batch, state, extra_args, for_losses=None):
    if options.tasks:
      seen = {**extra_args, **(for_losses or {})}
      seen = {name: arg for name, arg in seen.items() if accepts(name)}
      given = Problem(losses_and_aux, params, batch, {}, seen, jnp.ones([0], bool))
      return _over_tasks(given, step, state, extra_args, options)
    n = validate.leading_axis("batch", batch)
    if n is None:
      raise ValueError("batch must hold at least one array, got none.")
    shards = Shards(options.axis_name, n)
    rows, whole = arguments.split_rows(extra_args, options.row_args)
    for name, arg in rows.items():
      validate.same_rows(name, arg, n)
    for_losses = for_losses or {}
    seen = {name: arg for name, arg in extra_args.items() if accepts(name)}
    seen.update({name: arg for name, arg in for_losses.items() if accepts(name)})
    seen_rows, seen_whole = arguments.split_rows(seen, options.row_args)
    absent = {name: None for name, arg in seen.items() if arg is None}
    finite = finite_rows(batch, n)
    problem = Problem(
      losses_and_aux,
      shards.marked(params),
      jax.tree.map(lambda leaf: ways.replace_bad_rows(finite, leaf), batch),
      seen_rows,
      {**absent, **seen_whole},
      finite,
    )
    if step is None:
      state = init_members(params) if state is None else state
      return _by_mean(problem, state, shards, rows.get("member_weights"), options)
    over = optax.with_extra_args_support(step)
    state = over.init(params) if state is None else state
    # Args that differ between devices but hold no rows go to the losses only.
    whole = {
      name: arg
      for name, arg in whole.items()
      if not (accepts(name) and shards.is_apart(arg))
    }
    items = {**(batch if isinstance(batch, dict) else {}), **extra_args}
    items.update(for_losses)
    dtype = _weight_dtype(params)
    plan = arguments.make_plan(
      over, state, shards, arguments.Plan(whole, rows, {}, items, options, dtype)
    )
    return _by_step(problem, over, state, shards, plan)

  return function


def _is_over_tasks(over: str, **other_modes: Any) -> bool:
  validate.choice("over", over, ("examples", "tasks"))
  given = [name for name, value in other_modes.items() if value is not None]
  if over == "tasks" and given:
    raise ValueError(
      f"over='tasks' needs {given[0]}=None: on several devices, let the compiler split"
      " the batch, as train_step does with partition='jit'."
    )
  return over == "tasks"


def _over_tasks(
  problem: Problem,
  step: optax.GradientTransformation | None,
  state: PyTree,
  extra_args: dict[str, Any],
  options: Options,
) -> Differentiated:
  """The gradient of tasks' losses through a step over them; None is their mean."""
  n = tasks.number_of(problem)
  problem = problem._replace(finite=jnp.ones([n], bool))
  over = optax.with_extra_args_support(tasks.MEAN if step is None else step)
  state = over.init(problem.params) if state is None else state
  rows = tasks.member_weights(extra_args, n)
  whole = {
    name: arg
    for name, arg in extra_args.items()
    if name not in rows and arg is not None
  }
  dtype = _weight_dtype(problem.params)
  plan = arguments.Plan(whole, rows, {}, {}, options, dtype)
  plan = arguments.make_plan(over, state, Shards(None, n), plan)
  found, state = tasks.by_step(problem, over, state, plan)
  return Differentiated(found, state, {})


def _weight_dtype(params: PyTree) -> Any:
  """The type of the examples' weights: float32, or that of wider parameters."""
  leaves = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]
  inexact = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  return numerics.real(numerics.widest(jnp.float32, *(x.dtype for x in inexact)))


def _evaluate(
  problem: Problem, weigh: ways.Weigh, options: Options, values_first: bool = False
) -> tuple[Evaluated, Any]:
  if options.num_micro_batches > 1:
    found, carried = ways.in_micro_batches(
      problem, weigh, options, values_first=values_first
    )
  else:
    found, carried = ways.whole(problem, weigh, options)
  return ways.without_ruined(found, problem), carried


def _by_mean(
  problem: Problem,
  state: MemberState,
  shards: Shards,
  member_weights: Any,
  options: Options,
) -> Differentiated:
  """The weighted sum over the examples of all devices, with its divisor."""
  dtype = _weight_dtype(problem.params)
  asked, _, not_usable = clean_weights(member_weights, shards.n, dtype)
  among = lambda finite: jnp.where(finite, asked, jnp.zeros_like(asked)) / shards.total
  found, _ = _evaluate(problem, lambda known: (among(known.finite), None), options)
  weight = among(found.finite).sum()
  bad = jnp.logical_and(asked > 0, jnp.logical_not(found.finite))
  dropped = bad.sum(dtype=dtype) + not_usable.astype(dtype)
  grads = found.grads
  if options.reduce is None:
    grads, weight, dropped = shards.sum((grads, weight, dropped))
  else:
    grads, (weight, dropped) = options.reduce(grads), shards.sum((weight, dropped))
  count = numerics.increment(state.num_dropped, dropped.astype(jnp.int32))
  found = found._replace(grads=grads)
  return Differentiated(found, MemberState(count), {}, divisor=weight)


def _by_step(
  problem: Problem,
  step: optax.GradientTransformationExtraArgs,
  state: PyTree,
  shards: Shards,
  plan: arguments.Plan,
) -> Differentiated:
  """The step over the examples of all devices, fused where it is linear."""
  options, total = plan.options, shards.total

  def weigh(known):
    gathered = arguments.gather(shards, plan, known)
    args = arguments.step_arguments(plan, gathered)
    weights = linear.transpose(step, total, state, args, plan.dtype)
    return shards.own(weights), (gathered, args)

  values_first = options.num_micro_batches > 1 and (
    arguments.needs_values(options, plan.items, {})
    or linear.uses(step, total, state, arguments.blank_arguments(plan, total), "losses")
  )
  try:
    found, (gathered, args) = _evaluate(problem, weigh, options, values_first)
  except linear.NotLinearError as error:
    blank = arguments.blank_arguments(plan, total)
    if "norms" not in plan.rows and (
      linear.looks_at(step, total, state, blank) == "norms"
    ):
      return _by_norms(problem, step, state, shards, plan)
    if options.axis_name is not None:
      raise ValueError(_NOT_OVER_DEVICES) from error
    if options.num_micro_batches > 1:
      raise
    return _by_examples(problem, step, state, shards, plan)
  if (options.num_micro_batches > 1 and not values_first) or total == shards.n:
    # What the backward pass has shown: the losses, or a gradient that isn't finite.
    gathered = arguments.gather(shards, plan, found.known, gathered)
    args = arguments.step_arguments(plan, gathered)
  grads = (options.reduce or shards.sum)(found.grads)
  _, state = step.update(jnp.zeros([total], plan.dtype), state, None, **args)
  return Differentiated(found._replace(grads=grads), state, gathered.along)


def _by_norms(
  problem: Problem,
  step: optax.GradientTransformationExtraArgs,
  state: PyTree,
  shards: Shards,
  plan: arguments.Plan,
) -> Differentiated:
  """A step that looks at norms alone: a pass for them comes first."""
  norms = per_example.norms(per_example.of_examples(problem, plan.options).sweep)
  problem = problem.without(jnp.logical_and(problem.finite, jnp.isfinite(norms)))
  rows = {**plan.rows, "norms": norms}
  plan = arguments.make_plan(step, state, shards, plan._replace(rows=rows))
  return _by_step(problem, step, state, shards, plan)


def _by_examples(
  problem: Problem,
  step: optax.GradientTransformationExtraArgs,
  state: PyTree,
  shards: Shards,
  plan: arguments.Plan,
) -> Differentiated:
  """A step that is not linear, on per-example gradients."""
  losses, aux = problem.values(problem.params)
  aux, statistics = ways.split_aux(aux, losses.shape[0], plan.options)
  aux = ways.without_replaced(aux, problem, plan.options)
  finite = jnp.logical_and(problem.finite, jnp.isfinite(losses))

  def args_for(finite: Array) -> dict[str, Any]:
    known = arguments.Known(finite, losses, aux)
    return arguments.step_arguments(plan, arguments.gather(shards, plan, known))

  stepped = per_example.Stepped(step, state, args_for, problem.params)
  problem = problem._replace(finite=finite)
  # Here gradients are still apart, and one that is not finite makes its example bad.
  source = per_example.of_examples(problem, plan.options)
  grads, state, finite = per_example.run(source, stepped, plan.options)
  found = Evaluated(losses, aux, statistics, grads, finite)
  return Differentiated(found, state, {})
