"""Many micro-batches in one compiled step, and one reduction across devices."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.sharding import vary
from optax_ranger._core.sharding import varying_axes
from optax_ranger._core.tree import all_finite
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree


class MicroBatchReport(NamedTuple):
  """What went into a gradient of ``micro_batched``.

  Attributes:
    weight: ``float32``, the sum of the weights, over all devices. Pass it as
      ``weight=`` to ``accumulate``.
    num_left_out: ``int32``, micro-batches left out because their gradient, a
      scalar of their value, or their weight was not finite.
  """

  weight: Array
  num_left_out: Array


def micro_batched(
  value_and_grad_fn: Callable[..., Any],
  num_micro_batches: int,
  *,
  weigh: Callable[[Any], Any] | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  value_axes: Any = None,
) -> Callable[..., Any]:
  r"""Computes a gradient in micro-batches, with the memory of one.

  It scans over the micro-batches of a batch of any size; when the size does not
  divide, the last one is smaller. ``optax.microbatch`` refuses such batches, and
  knows neither weights nor devices.

  .. math::
    g = \sum_j w_j g_j \, / \, \sum_j w_j

  Under ``jax.shard_map``, name the axis: gradients then stay apart on each
  device until one ``psum`` at the end, for any number of micro-batches. Without
  the name, JAX sums the gradient of replicated parameters in every micro-batch.

  Args:
    value_and_grad_fn: ``(params, batch, **extra_args) -> (value, grads)``, the
      gradient of a *mean* over the batch, as of ``jax.value_and_grad`` or
      ``optax_ranger.value_and_grad`` with ``aggregate_by_mean``.
    num_micro_batches: a static Python integer; a batch of n examples is cut into
      pieces of ceil(n / num_micro_batches).
    weigh: ``micro_batch -> weight``, tokens or a mask's sum; None for the number
      of examples. Where ``value_and_grad`` may leave examples out, weigh by the
      number of finite ones.
    axis_name: the mesh axis, or axes, over which devices hold parts of the
      batch; None for one device, or for automatic sharding.
    value_axes: which leaves of the value hold one row an example: 0 for those, None
      for the others, as a prefix of its tree, such as ``(None, {"predictions": 0,
      "mean": None})``; as ``out_axes`` of ``jax.vmap``. When missing, that of
      ``optax_ranger.value_and_grad``, whose losses have rows, else no leaf has.

  Returns:
    A function ``(params, batch, **extra_args) -> (value, grads, report)``.
    Every leaf of ``batch`` has leading axis n; extra args go to each call whole.
    Leaves of ``value`` with one row an example come back with n rows, each device
    its own. All others are averaged with the weights, and over devices; integers,
    which are counts, are added up, and booleans become a share.

  Guarantees:
    * The result is the gradient of the whole batch, for any number of micro-batches.
    * A non-finite micro-batch has weight zero, on its own device only.
    * One reduction across devices.

  Raises:
    TypeError: for a number of micro-batches that is not a Python integer.
    ValueError: for one below 1, and for leaves that differ in their leading axis.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> mean_loss = lambda w, batch: (w * batch).mean()
    >>> grad_fn = jax.jit(ranger.micro_batched(jax.value_and_grad(mean_loss), 2))
    >>> value, grad, report = grad_fn(jnp.array(2.0), jnp.array([1.0, 2.0, 6.0]))
    >>> print(value, grad, report.weight)  # pieces of 2 and 1
    6.0 3.0 3.0
  """
  validate.static_count("num_micro_batches", num_micro_batches)
  if value_axes is None:
    value_axes = getattr(value_and_grad_fn, "value_axes", None)

  def function(params: PyTree, batch: PyTree, **extra_args: Any) -> Any:
    n = validate.leading_axis("batch", batch)
    if not n:
      raise ValueError(f"batch must hold at least one example, got {n}.")
    size = -(-n // num_micro_batches)
    whole = n // size
    if axis_name is not None:
      params = jax.tree.map(lambda leaf: vary(leaf, axis_name), params)

    def evaluate(micro_batch):
      value, grads = value_and_grad_fn(params, micro_batch, **extra_args)
      rows = jax.tree.leaves(micro_batch)[0].shape[0]
      weight = numerics.scalar(weigh(micro_batch) if weigh else rows)
      by_row, others = _split(jax.tree.map(jnp.asarray, value), value_axes, rows)
      inexact = [leaf for leaf in jax.tree.leaves(others) if not _is_count(leaf)]
      good = jnp.logical_and(weight >= 0, weight < jnp.inf)
      good = jnp.logical_and(good, all_finite((grads, inexact)))
      return by_row, (others, grads), weight, good

    def add(total, part):
      sums, weight_sum, left_out = total
      _, terms, weight, good = part
      weight = jnp.where(good, weight, jnp.zeros_like(weight))

      def add_leaf(sum_, term):
        term = term.astype(sum_.dtype)
        new = sum_ + (term if _is_count(sum_) else weight.astype(sum_.dtype) * term)
        return jnp.where(good, new, sum_)

      sums = jax.tree.map(add_leaf, sums, terms)
      left_out = numerics.increment(left_out, jnp.logical_not(good))
      return sums, weight_sum + weight, left_out

    def step(total, micro_batch):
      part = evaluate(micro_batch)
      return add(total, part), part[0]

    micro_batches = jax.tree.map(
      lambda leaf: leaf[: whole * size].reshape(whole, size, *leaf.shape[1:]), batch
    )
    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    _, types, _, good = jax.eval_shape(evaluate, first)
    total = _zeros(types, good)
    total, by_row = jax.lax.scan(step, total, micro_batches)
    by_row = jax.tree.map(
      lambda leaf: leaf.reshape(whole * size, *leaf.shape[2:]), by_row
    )
    if whole * size < n:
      rest = evaluate(jax.tree.map(lambda leaf: leaf[whole * size :], batch))
      total = add(total, rest)
      by_row = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), by_row, rest[0])
    if axis_name is not None:
      total = jax.lax.psum(total, axis_name)
    sums, weight, left_out = total

    def mean(sum_, like):
      if _is_count(sum_):
        return sum_
      dtype = sum_.dtype if like.dtype == bool else like.dtype
      divisor = weight.astype(numerics.real(sum_.dtype))
      return numerics.divide(sum_, divisor).astype(dtype)

    others, grads = jax.tree.map(mean, sums, types)
    return _merge(by_row, others), grads, MicroBatchReport(weight, left_out)

  return function


def _split(value: PyTree, value_axes: Any, rows: int) -> tuple[PyTree, PyTree]:
  """Parts a value into leaves with one row an example, and all others."""
  no_axis = lambda node: node is None
  axes = jax.tree.broadcast(value_axes, value, is_leaf=no_axis)
  flags = jax.tree.leaves(axes, is_leaf=no_axis)
  paths, structure = jax.tree_util.tree_flatten_with_path(value)
  by_row, others = [], []
  for (path, leaf), axis in zip(paths, flags, strict=True):
    if axis not in (0, None):
      raise ValueError(f"value_axes must hold 0 or None, got {axis!r}.")
    if axis == 0 and jnp.shape(leaf)[:1] != (rows,):
      raise ValueError(
        f"value{jax.tree_util.keystr(path)} must have one row for each of the {rows}"
        f" examples of a micro-batch, as value_axes= says, got {list(leaf.shape)}."
      )
    by_row.append(leaf if axis == 0 else None)
    others.append(None if axis == 0 else leaf)
  return structure.unflatten(by_row), structure.unflatten(others)


def _is_count(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.integer)


def _merge(by_row: PyTree, others: PyTree) -> PyTree:
  choose = lambda a, b: b if a is None else a
  return jax.tree.map(choose, by_row, others, is_leaf=lambda leaf: leaf is None)


def _zeros(terms: PyTree, good: Any) -> Any:
  """Sums at their start, each varying over the devices as its terms will."""

  def zero(like, dtype):
    return vary(jnp.zeros(like.shape, dtype), varying_axes(like) | varying_axes(good))

  kind = lambda like: like.dtype if _is_count(like) else numerics.wide(like.dtype)
  sums = jax.tree.map(lambda like: zero(like, kind(like)), terms)
  return sums, zero(good, jnp.float32), zero(good, jnp.int32)
