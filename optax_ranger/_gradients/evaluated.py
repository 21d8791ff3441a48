"""Losses and gradient of a weighted batch: whole, in micro-batches, or per example."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.members import keep_rows
from optax_ranger._core.sharding import is_sharded
from optax_ranger._core.sharding import per_row
from optax_ranger._core.sharding import replicate
from optax_ranger._core.shards import vary_as
from optax_ranger._core.tree import all_finite
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._gradients import unreduced
from optax_ranger._gradients.arguments import Known
from optax_ranger._gradients.options import Options


class Problem(NamedTuple):
  """What is differentiated, on this device.

  Attributes:
    losses: ``(params, batch, extra_args) -> (losses, aux)``.
    params: what to differentiate by.
    batch: leaves of ``[n, ...]``, finite.
    rows: extra args of the losses with one row an example.
    shared: the other extra args of the losses.
    finite: ``bool [n]``, which examples came with finite inputs.
  """

  losses: Callable[..., tuple[Array, Any]]
  params: PyTree
  batch: PyTree
  rows: dict[str, Any]
  shared: dict[str, Any]
  finite: Array

  def values(self, params: PyTree) -> tuple[Array, Any]:
    """Losses and aux of all rows."""
    losses, aux = self.losses(params, self.batch, {**self.shared, **self.rows})
    refuse_other_than_a_loss_each(losses, self.finite.shape[0])
    return losses, aux

  def without(self, finite: Array) -> "Problem":
    """With further rows replaced, whose gradients are not finite."""
    batch = jax.tree.map(lambda leaf: replace_bad_rows(finite, leaf), self.batch)
    return self._replace(batch=batch, finite=finite)


class Evaluated(NamedTuple):
  """A batch, evaluated on this device.

  Attributes:
    losses: ``float [n]``.
    aux: what came with them: rows of ``[n, ...]``, or anything.
    statistics: items of aux without rows, ``[num_micro_batches, ...]``; none where
      `Options` does not part them.
    grads: the gradient of the weighted losses, like the parameters.
    finite: ``bool [n]``, which examples have finite inputs and a finite loss.
  """

  losses: Array
  aux: Any
  statistics: dict[str, Any]
  grads: PyTree
  finite: Array

  @property
  def known(self) -> Known:
    """As what the engine knows of the examples."""
    return Known(self.finite, self.losses, self.aux)


# Weights of this device's examples [n], from what is known of them, and whatever else
# the caller wants back.
Weigh = Callable[[Known], tuple[Array, Any]]


def whole(problem: Problem, weigh: Weigh, options: Options) -> tuple[Evaluated, Any]:
  """In one backward pass over all rows."""
  losses, pull_back, aux = jax.vjp(problem.values, problem.params, has_aux=True)
  aux, statistics = split_aux(aux, losses.shape[0], options)
  aux = without_replaced(aux, problem, options)
  finite = jnp.logical_and(problem.finite, replicate(jnp.isfinite(losses)))
  weights, carried = weigh(Known(finite, losses, aux))
  (grads,) = pull_back(per_row(weights.astype(losses.dtype), losses))
  return Evaluated(losses, aux, statistics, grads, finite), carried


def in_micro_batches(
  problem: Problem, weigh: Weigh, options: Options, *, values_first: bool
) -> tuple[Evaluated, Any]:
  """With the activations of one micro-batch at a time.

  With `values_first`, a forward pass over all of them comes before the weights.
  """
  num, finite = options.num_micro_batches, problem.finite
  rows = _cut((problem.batch, problem.rows), num)
  keys = _keys_of_micro_batches(problem.shared, num)
  known = Known(finite)
  if values_first:
    losses, aux = jax.lax.map(
      lambda piece: _piece(problem, problem.params, problem.shared, piece), (rows, keys)
    )
    aux, _ = _join_aux(aux, losses.shape[1], options)
    aux = without_replaced(aux, problem, options)
    losses = _rejoin(losses)
    finite = jnp.logical_and(finite, jnp.isfinite(losses))
    known = Known(finite, losses, aux)
  weights, carried = weigh(known)

  def accumulate(params, start, shared, pieces):
    def add(total, given):
      piece, weights = given
      losses, pull_back, aux = jax.vjp(
        lambda params: _piece(problem, params, shared, piece), params, has_aux=True
      )
      refuse_other_than_a_loss_each(losses, weights.shape[0])
      kept = jnp.where(jnp.isfinite(losses), weights.astype(losses.dtype), 0)
      (grads,) = pull_back(kept)
      total = jax.tree.map(lambda sum_, g: sum_ + g.astype(sum_.dtype), total, grads)
      return total, (losses, aux)

    first = jax.tree.map(lambda leaf: leaf[0], pieces)
    types, _ = jax.eval_shape(add, start, first)
    total, out = jax.lax.scan(add, vary_as(start, types), pieces)
    return jax.tree.map(lambda sum_, leaf: sum_.astype(leaf.dtype), total, params), out

  start = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, numerics.wide(leaf.dtype)), problem.params
  )
  args = problem.params, start, problem.shared, ((rows, keys), _cut(weights, num))
  found = None
  if options.unreduced:
    found = unreduced.reduced_once(accumulate, args, options.unreduced)
  grads, (losses, aux) = accumulate(*args) if found is None else found
  aux, statistics = _join_aux(aux, losses.shape[1], options)
  aux = without_replaced(aux, problem, options)
  losses = _rejoin(losses)
  finite = jnp.logical_and(finite, jnp.isfinite(losses))
  return Evaluated(losses, aux, statistics, grads, finite), carried


def without_ruined(found: Evaluated, problem: Problem) -> Evaluated:
  """Without a usable example, if one whose loss isn't finite has ruined the gradient.

  Its weight is zero, but zero times a derivative that isn't finite is NaN, and the rows
  share the backward pass.
  """
  lost = jnp.logical_xor(problem.finite, found.finite).any()

  def check(grads):
    good = all_finite(grads)
    keep = lambda leaf: jnp.where(good, leaf, jnp.zeros_like(leaf))
    return jax.tree.map(keep, grads), good

  # In place: a `where` on its own would hold the gradient twice.
  unchanged = lambda grads: (grads, jnp.logical_not(lost))
  grads, good = jax.lax.cond(lost, check, unchanged, found.grads)
  return found._replace(grads=grads, finite=jnp.logical_and(found.finite, good))


def refuse_other_than_a_loss_each(losses: Array, n: int) -> None:
  """Refuses losses that are not one number for each row."""
  if jnp.shape(losses) != (n,):
    raise ValueError(
      f"per_example_losses must return losses of shape [{n}], one for each row (of a"
      f" device and a micro-batch, where there are several), got"
      f" {list(jnp.shape(losses))}: leave out the mean over the batch, and name extra"
      " args with one row per example in row_args=."
    )


def replace_bad_rows(finite: Array, leaf: Any) -> Array:
  """Puts the first finite row where rows are not finite; zeros if there is none.

  Zeros alone won't do: a norm or a logarithm has no gradient there, and a weight
  of zero does not undo that.
  """
  leaf = jnp.asarray(leaf)
  if leaf.shape[0] and not is_sharded(leaf):
    # By an array of places: of rows that the compiler has split over devices, it sends
    # the one that is taken. For a scalar place it would gather them all.
    first = jnp.argmax(finite, keepdims=True)
    row = leaf.at[first].get(mode="promise_in_bounds")
    row = jnp.where(finite.any(), row, jnp.zeros_like(row))
    return jnp.where(per_row(finite, leaf), leaf, row)
  return keep_rows(finite, leaf)


def without_replaced(aux: Any, problem: Problem, options: Options) -> Any:
  """NaN in rows of aux whose example came with inputs that are not finite.

  They are those of the row in its place, and not the example's predictions.
  """
  if options.statistics is None or aux is None:
    return aux

  def mark(leaf):
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      return leaf
    nan = jnp.full_like(leaf, jnp.nan)
    return jnp.where(per_row(problem.finite, leaf), leaf, nan)

  return jax.tree.map(mark, aux)


def split_aux(aux: Any, n: int, options: Options) -> tuple[Any, dict[str, Any]]:
  """Parts aux into items with rows, and statistics with an axis of micro-batches."""
  if options.statistics is None or not options.has_aux:
    return aux, {}
  if not isinstance(aux, dict):
    raise ValueError(
      "with has_aux=True per_example_losses must return (losses, aux) with a"
      f" dictionary as aux, got {type(aux).__name__}."
    )
  stack = lambda leaf: jnp.asarray(leaf)[None]
  rows, statistics = {}, {}
  for name, item in aux.items():
    if options.is_statistic(name, item):
      statistics[name] = jax.tree.map(stack, item)
    else:
      _refuse_other_than_rows(name, item, n)
      rows[name] = item
  return rows, statistics


def _join_aux(aux: Any, size: int, options: Options) -> tuple[Any, dict[str, Any]]:
  """As `split_aux`, of micro-batches; rows come in their order."""
  if aux is None:
    return None, {}
  one = jax.tree.map(lambda leaf: leaf[0], aux)
  rows, statistics = split_aux(one, size, options)
  return (
    {name: jax.tree.map(_rejoin, aux[name]) for name in rows},
    {name: aux[name] for name in statistics},
  )


def _refuse_other_than_rows(name: str, item: Any, n: int) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(item):
    if jnp.shape(leaf)[:1] != (n,):
      raise ValueError(
        f"aux[{name!r}]{jax.tree_util.keystr(path)} must hold one row for each of"
        f" {n} examples, got shape {list(jnp.shape(leaf))}: name it in statistics= if"
        " it belongs to the batch as a whole."
      )


def _piece(
  problem: Problem, params: PyTree, shared: dict[str, Any], piece: Any
) -> tuple[Array, Any]:
  (batch, rows), keys = piece
  return problem.losses(params, batch, {**shared, **keys, **rows})


def _keys_of_micro_batches(shared: dict[str, Any], num: int) -> dict[str, Any]:
  """A key for each micro-batch, of every key among the extra args."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  return {
    name: fold(arg, jnp.arange(num))
    for name, arg in shared.items()
    if validate.is_key(arg)
  }


def _cut(tree: PyTree, num: int) -> PyTree:
  """[n, ...] to [m, n / m, ...]; every m-th row, so that rows stay where they are."""

  def cut(leaf):
    n = leaf.shape[0]
    if n % num:
      raise ValueError(
        f"num_micro_batches must divide the {n} rows of a device, got {num};"
        " train_step pads what it is given."
      )
    return jnp.swapaxes(leaf.reshape(n // num, num, *leaf.shape[1:]), 0, 1)

  return jax.tree.map(cut, tree)


def _rejoin(leaf: Array) -> Array:
  """[m, n / m, ...] to [n, ...], in the order that `_cut` was given."""
  return jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])
