"""One device's part of a training step: losses, gradient, optimizer."""

from collections.abc import Callable
import inspect
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.shards import Shards
from optax_ranger._core.tree import find_states
from optax_ranger._core.types import PyTree
from optax_ranger._gradients import arguments
from optax_ranger._gradients import fusion
from optax_ranger.steps import _predictions
from optax_ranger.training import _placement


class TrainStepState(NamedTuple):
  """The state of ``train_step``.

  Attributes:
    step: the state of the step over examples: counters.
    optimizer: the optimizer's state.
  """

  step: PyTree
  optimizer: PyTree


class Update(NamedTuple):
  """What one device does: losses, gradient, optimizer."""

  losses: Callable[..., Any]
  optimizer: optax.GradientTransformationExtraArgs
  step: optax.GradientTransformationExtraArgs
  has_aux: bool
  options: dict[str, Any]

  def __call__(self, axis_name, late, params, state, batch, rows, shared):
    """The whole update; with `late`, the optimizer gets this device's part."""
    if late:
      state = _placement.map_windows(lambda leaf: leaf[0], state)
    tables = list(find_states(state, _predictions.PredictionState))
    reduce = (lambda grads: grads) if late else None
    grads, step_state, by_row, others, metrics = self.forward(
      axis_name, reduce, True, params, state.step, tables, batch, rows, shared
    )
    params, optimizer_state = self.apply(
      params, state.optimizer, grads, {**by_row, **others}
    )
    state = TrainStepState(step_state, optimizer_state)
    if late:
      state = _placement.map_windows(lambda leaf: leaf[None], state)
    return params, state, metrics

  def apply(self, params, optimizer_state, grads, extra_args):
    updates, optimizer_state = self.optimizer.update(
      grads, optimizer_state, params, **extra_args
    )
    return optax.apply_updates(params, updates), optimizer_state

  def forward(
    self, axis_name, reduce, meet, params, step_state, tables, batch, rows, shared
  ):
    """Gradient, the step's state, extra args by row, other ones, and metrics.

    With `meet`, predictions and their ids are those of all devices.
    """
    n = validate.leading_axis("batch", batch) or 0
    shards = Shards(axis_name, n)
    ids = None
    if tables and "example_ids" in rows:
      ids = shards.gather(rows["example_ids"])
    gradient = fusion.gradient_of(
      self.losses,
      self.step,
      has_aux=self.has_aux,
      axis_name=axis_name,
      reduce=reduce,
      meet=("predictions",) if meet and ids is not None else (),
      **self.options,
    )
    seen = {**self._smoothed(tables, ids, shards), **rows, **shared}
    losses, aux, grads, step_state, finite, met = gradient(
      params, batch, step_state, seen
    )
    aux = aux if isinstance(aux, dict) else {}
    by_row = {name: item for name, item in aux.items() if _has_rows(item, n)}
    asked = rows.get("member_weights", jnp.ones([n], losses.dtype))
    present = jnp.logical_and(finite, asked > 0)
    weights = jnp.where(present, asked.astype(losses.dtype), 0)
    means = {name: item for name, item in aux.items() if _is_metric(item, n)}
    # One small reduction for all.
    spread = lambda item: jnp.broadcast_to(item, [n]).astype(losses.dtype)
    add = lambda item: jnp.where(present, weights * spread(item), 0).sum()
    sums, total, dropped = shards.sum(
      (
        jax.tree.map(add, {**means, "loss": losses}),
        weights.sum(),
        # A float, so that it rides along with the others.
        jnp.logical_and(asked != 0, jnp.logical_not(present)).sum(dtype=losses.dtype),
      )
    )
    metrics = {name: numerics.divide(sum_, total) for name, sum_ in sums.items()}
    others = {"weight": total, "value": metrics["loss"], **shared}
    others.update({name: metrics[name] for name in means if name not in by_row})
    by_row.update({name: arg for name, arg in rows.items() if name != "member_weights"})
    if meet and ids is not None and "predictions" in aux:
      by_row["example_ids"] = ids
      found = met or shards.gather({"predictions": aux["predictions"]})
      by_row["predictions"] = found["predictions"]
    return (
      grads,
      step_state,
      by_row,
      others,
      {**metrics, "weight": total, "num_dropped": dropped.astype(jnp.int32)},
    )

  def _smoothed(self, tables, ids, shards) -> dict[str, Any]:
    """Smoothed predictions of the batch's examples, for losses that take them."""
    parameters = inspect.signature(self.losses).parameters
    if ids is not None and arguments.accepted_names(self.losses)("smoothed"):
      return {"smoothed": shards.own(_predictions.smoothed_predictions(tables, ids))}
    named = parameters.get("smoothed")
    if named is not None and named.default is named.empty:
      raise ValueError(
        "per_example_losses takes smoothed=: that needs smooth_predictions in the"
        " optimizer, and update(..., example_ids=...)."
      )
    return {}


def _has_rows(item: Any, n: int) -> bool:
  leaves = jax.tree.leaves(item)
  return bool(leaves) and all(jnp.shape(leaf)[:1] == (n,) for leaf in leaves)


def _is_metric(item: Any, n: int) -> bool:
  """Numbers, one an example or one in all, that have a mean."""
  if not isinstance(item, jax.Array) or item.shape not in ((), (n,)):
    return False
  return jnp.issubdtype(item.dtype, jnp.floating) or item.dtype == bool
