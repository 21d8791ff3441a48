"""One device's part of a training step: losses, gradient, optimizer."""

from collections.abc import Callable
import inspect
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.shards import AxisName
from optax_ranger._core.shards import Shards
from optax_ranger._core.shards import names_of
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._gradients import arguments
from optax_ranger._gradients import fusion
from optax_ranger._gradients.options import Options

# What metrics hold besides items of aux.
METRICS = ("loss", "weight", "num_dropped")


@states.exportable
class TrainStepState(NamedTuple):
  """The state of ``train_step``.

  Attributes:
    step: the state of the step over examples: counters.
    optimizer: the optimizer's state.
  """

  step: PyTree
  optimizer: PyTree


class Given(NamedTuple):
  """What comes with a call.

  Attributes:
    batch: leaves of ``[n, ...]``.
    rows: extra args with one row an example.
    shared: the other extra args.
  """

  batch: PyTree
  rows: PyTree
  shared: PyTree


class Reduction(NamedTuple):
  """How devices meet.

  Attributes:
    axis_name: over which examples are split; None for one device, or where the
      compiler splits.
    reduce: adds a gradient up over devices; None for one ``psum``.
    rows: whether tables of rows get what they need of all devices.
  """

  axis_name: AxisName
  reduce: Callable[[PyTree], PyTree] | None = None
  rows: bool = True


class Forwarded(NamedTuple):
  """What the optimizer needs.

  Attributes:
    grads: like the parameters.
    divisor: what they are still to be divided by; None for nothing.
    step_state: the new state of the step over examples.
    by_row: extra args of the optimizer with one row an example.
    others: the other ones.
    metrics: what the caller sees.
  """

  grads: PyTree
  divisor: PyTree
  step_state: PyTree
  by_row: PyTree
  others: PyTree
  metrics: PyTree

  def ready(self, grad: Array) -> Array:
    """A gradient as the optimizer wants it; inside its branch, this costs no pass."""
    if self.divisor is not None:
      grad = numerics.divide(grad, self.divisor.astype(numerics.real(grad.dtype)))
    # Of a complex parameter, JAX's gradient is the conjugate of what descends.
    return jnp.conj(grad)


class Update(NamedTuple):
  """What one device does: losses, gradient, optimizer."""

  losses: Callable[..., Any]
  optimizer: optax.GradientTransformationExtraArgs
  step: optax.GradientTransformation | None
  options: Options

  def __call__(
    self,
    axis_name: AxisName,
    reduce_on_emission: bool,
    params: PyTree,
    state: TrainStepState,
    given: Given,
  ) -> tuple[PyTree, TrainStepState, dict[str, Any]]:
    """The whole update; on emission, the optimizer gets this device's part."""
    reduction = Reduction(axis_name)
    if reduce_on_emission:
      state = states.map_windows(lambda leaf: leaf[0], state)
      reduction = reduction._replace(reduce=lambda grads: grads)
    tables = states.tables(state)
    forwarded = self.forward(reduction, params, state.step, tables, given)
    params, state = self.apply(params, state, forwarded)
    if reduce_on_emission:
      state = states.map_windows(lambda leaf: leaf[None], state)
    return params, state, forwarded.metrics

  def apply(
    self, params: PyTree, state: TrainStepState, forwarded: Forwarded
  ) -> tuple[PyTree, TrainStepState]:
    """The optimizer's step; without a usable example only ``last=`` moves something."""
    extra_args = {**forwarded.by_row, **forwarded.others}

    def move():
      grads = jax.tree.map(forwarded.ready, forwarded.grads)
      updates, new_state = self.optimizer.update(
        grads, state.optimizer, params, **extra_args
      )
      return optax.apply_updates(params, updates), new_state

    alive = forwarded.metrics["weight"] > 0
    if "last" in extra_args and states.windows(state.optimizer):
      given = 1 if extra_args["weight"] is None else extra_args["weight"]
      extra_args["weight"] = jnp.where(alive, given, 0)
      closes = jnp.asarray(extra_args["last"]).astype(bool)
      alive = jnp.logical_or(alive, closes & states.is_open(state.optimizer))
    if states.idles(state.optimizer):
      # One conditional inside another would copy the sum of the window.
      extra_args["present"] = alive
      moved, optimizer_state = move()
      optimizer_state = states.choose(alive, optimizer_state, state.optimizer)
      choose = lambda new, old: jnp.where(alive, new, old)
      params = jax.tree.map(choose, moved, params)
    else:
      params, optimizer_state = _cond(alive, move, (params, state.optimizer))
    return params, TrainStepState(forwarded.step_state, optimizer_state)

  def forward(
    self,
    reduction: Reduction,
    params: PyTree,
    step_state: PyTree,
    tables: list[Any],
    given: Given,
  ) -> Forwarded:
    """Gradient and metrics of a batch, and the optimizer's extra args."""
    batch, rows, shared = given
    tasks = self.options.tasks
    n = 0 if tasks else validate.leading_axis("batch", batch) or 0
    shards = Shards(reduction.axis_name, n)
    ids, remembered = None, {}
    if tables and "example_ids" in rows:
      ids = shards.gather(rows["example_ids"])
      remembered = self._remembered(tables, ids, shards)
    along = [name for table in tables for name in table.gathered]
    options = self.options._replace(
      axis_name=reduction.axis_name,
      reduce=reduction.reduce,
      row_args=(*self.options.row_args, *remembered),
      along=tuple(along) if reduction.rows and ids is not None else (),
    )
    self._refuse_missing({**shared, **rows, **remembered})
    gradient = fusion.gradient_of(self.losses, self.step, options)
    found, step_state, everywhere, divisor = gradient(
      params,
      batch,
      step_state,
      {**rows, **shared},
      {**_keys_of_device(shared, shards), **remembered},
    )
    if tasks:
      aux = found.aux or {}
      _refuse_metrics(aux, "losses")
      metrics = _metrics(found._replace(aux=None), given, shards)
      metrics = {**aux, **metrics, "losses": found.losses}
      others = {"weight": metrics["weight"], "value": metrics["loss"], **shared}
      return Forwarded(found.grads, divisor, step_state, {}, others, metrics)
    metrics = _metrics(found, given, shards)
    aux = found.aux or {}
    others = {"weight": metrics["weight"], "value": metrics["loss"], **shared}
    others.update({name: metrics[name] for name in found.statistics})
    by_row = {**aux, **rows}
    by_row.pop("member_weights", None)
    here = {name: aux[name] for name in options.along if name in aux}
    if here:
      missing = {name: item for name, item in here.items() if name not in everywhere}
      by_row.update({**everywhere, **(shards.gather(missing) if missing else {})})
      by_row["example_ids"] = ids
    return Forwarded(found.grads, divisor, step_state, by_row, others, metrics)

  def _remembered(
    self, tables: list[Any], ids: Array, shards: Shards
  ) -> dict[str, Any]:
    """Rows of tables that losses or ``find_neighbors`` ask for."""
    asked = [arguments.accepted_names(self.losses)]
    if self.options.find_neighbors is not None:
      asked.append(arguments.accepted_names(self.options.find_neighbors))
    readers = [pair for table in tables for pair in table.readers().items()]
    remembered: dict[str, Any] = {}
    for name, read in readers:
      if name in remembered:
        raise ValueError(
          f"the optimizer has two states that keep {name}=: the losses could not tell"
          " them apart."
        )
      if any(accepts(name) for accepts in asked):
        remembered[name] = shards.own(read(ids))
    return remembered

  def _refuse_missing(self, known: dict[str, Any]) -> None:
    for one in list(inspect.signature(self.losses).parameters.values())[2:]:
      open_ended = one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
      if one.default is one.empty and not open_ended and one.name not in known:
        raise ValueError(
          f"per_example_losses takes {one.name}=: call update(..., {one.name}=...)."
          " smoothed= comes from smooth_predictions in the optimizer, if you call"
          " update(..., example_ids=...)."
        )


def _metrics(found: fusion.Evaluated, given: Given, shards: Shards) -> dict[str, Any]:
  """Weighted means over the usable examples of all devices, in one reduction."""
  aux = found.aux or {}
  _refuse_metrics({**aux, **found.statistics})
  dtype = found.losses.dtype
  asked = given.rows.get("member_weights", jnp.ones(found.losses.shape, dtype))
  usable = jnp.logical_and(asked > 0, asked < jnp.inf)
  present = jnp.logical_and(found.finite, usable)
  weights = jnp.where(present, asked.astype(dtype), 0)
  add = lambda item: jnp.where(present, weights * item.astype(dtype), 0).sum()
  means = {name: item for name, item in aux.items() if _has_mean(item)}
  sums, totals, weight, dropped = shards.sum(
    (
      jax.tree.map(add, {**means, "loss": found.losses}),
      _summed_statistics(found.statistics, weights),
      weights.sum(),
      # A float, so that it is summed with the others.
      jnp.logical_and(asked != 0, jnp.logical_not(present)).sum(dtype=dtype),
    )
  )
  nan = jnp.asarray(jnp.nan, dtype)
  mean = lambda sum_: jnp.where(weight > 0, numerics.divide(sum_, weight), nan)
  metrics = {name: mean(sum_) for name, sum_ in sums.items()}
  for name, item in totals.items():
    metrics[name] = _mean_statistic(
      item, found.statistics[name], weight, given.shared.get(name)
    )
  return {**metrics, "weight": weight, "num_dropped": dropped.astype(jnp.int32)}


def _refuse_metrics(aux: dict[str, Any], *others: str) -> None:
  for name in (*METRICS, *others):
    if name in aux:
      raise ValueError(
        f"aux must not have an item named {name!r}, which is a metric of train_step:"
        " rename it."
      )


def _summed_statistics(statistics: dict[str, Any], weights: Array) -> dict[str, Any]:
  """Sums over micro-batches: weighted ones of floats, plain ones of integers."""

  def add(leaf):
    num = leaf.shape[0]
    # Row i is in micro-batch i % num.
    part = weights.reshape(-1, num).sum(axis=0)
    there = jnp.expand_dims(part > 0, tuple(range(1, leaf.ndim)))
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return jnp.where(there, leaf, jnp.zeros_like(leaf)).sum(axis=0, dtype=leaf.dtype)
    wide = leaf.astype(numerics.widest(part.dtype, leaf.dtype))
    part = jnp.expand_dims(part, tuple(range(1, leaf.ndim))).astype(wide.dtype)
    return jnp.where(there, part * wide, jnp.zeros_like(wide)).sum(axis=0)

  return jax.tree.map(add, statistics)


def _mean_statistic(sums: Any, statistic: Any, weight: Array, before: Any) -> Any:
  """The mean of a statistic; without a usable example, what came in by its name."""

  def mean(sum_, leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return sum_
    divisor = weight.astype(numerics.real(sum_.dtype))
    # True and false become a share.
    dtype = weight.dtype if leaf.dtype == bool else leaf.dtype
    return numerics.divide(sum_, divisor).astype(dtype)

  new = jax.tree.map(mean, sums, statistic)
  if before is None or jax.tree.structure(before) != jax.tree.structure(new):
    return new
  choose = lambda new, old: jnp.where(weight > 0, new, jnp.asarray(old, new.dtype))
  return jax.tree.map(choose, new, before)


def _cond(alive: Array, move: Callable[[], Any], unchanged: Any) -> Any:
  """What `move` returns, or what is unchanged, without a copy of either."""
  try:
    return jax.lax.cond(alive, move, lambda: unchanged)
  except TypeError:
    # An optimizer whose state changes its types; there is nothing to keep in place.
    choose = lambda new, old: jnp.where(alive, new, jnp.asarray(old).astype(new.dtype))
    return jax.tree.map(choose, move(), unchanged)


def _keys_of_device(shared: dict[str, Any], shards: Shards) -> dict[str, Any]:
  """Of every key among the extra args, the key of this device."""
  if shards.axis_name is None:
    return {}
  index = jax.lax.axis_index(names_of(shards.axis_name))
  return {
    name: jax.random.fold_in(arg, index)
    for name, arg in shared.items()
    if validate.is_key(arg)
  }


def _has_mean(item: Any) -> bool:
  """Whether rows are numbers, one an example."""
  if not isinstance(item, jax.Array) or item.ndim != 1:
    return False
  return jnp.issubdtype(item.dtype, jnp.floating) or item.dtype == bool
