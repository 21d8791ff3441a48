"""Step 5: smoothed predictions of every training example."""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import labels
from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.sharding import automatic
from optax_ranger._core.sharding import place
from optax_ranger._core.shards import axes_of
from optax_ranger._core.shards import gather_rows
from optax_ranger._core.tree import find_states
from optax_ranger._core.tree import unboxed
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import transformation

# Allowed error of a sum of probabilities, for bfloat16 rows.
_TOLERANCE = 1 / 64


@states.exportable
class PredictionState(NamedTuple):
  """The state of ``smooth_predictions``.

  Attributes:
    count: ``int32``, calls so far.
    num_dropped: ``int32``, predictions left out so far because they were not
      probabilities, or their id was out of range.
    smoothed: ``float [num_examples, num_classes]``, zeros at first.
  """

  count: Array
  num_dropped: Array
  smoothed: Array

  split_by_rows = ("smoothed",)
  idles = True
  gathered = ("predictions",)

  def readers(self) -> dict[str, Callable[[Array], Array]]:
    """What the losses may ask for as ``smoothed=``."""
    return {"smoothed": lambda ids: smoothed_predictions(self, ids)}


def smooth_predictions(
  num_examples: int,
  num_classes: int,
  decay: Scalar = 0.7,
  *,
  dtype: str = "float32",
  sharding: jax.sharding.Sharding | None = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps a smoothed prediction of every training example; updates pass through.

  Each visit of an example moves its row towards the prediction of that visit.
  Read rows with ``smoothed_predictions(state, example_ids)`` and feed them to
  the next visit: to ``early_learning_regularizer``, ``refine_targets``, or as
  the beliefs of ``neighbors.weigh``. It helps where wrong labels are memorized
  late.

  .. math:: \tilde p_i \leftarrow \beta \tilde p_i + (1 - \beta) p_i

  Place it before ``accumulate`` or beside it: its inputs come with every
  micro-batch.

  Args:
    num_examples: rows of the table, N; a static Python integer.
    num_classes: columns of the table, C; a static Python integer.
    decay: :math:`\beta` in [0, 1). 0 keeps the last prediction.
    dtype: of the table, ``"float32"`` or ``"bfloat16"``. The mean is computed in
      float32 in both. It is rounded to bfloat16 up or down at random, in
      proportion, so that small steps count: rounded to the nearest, a row with
      a decay of 0.99 would stop up to 40 % away from its mean.
    sharding: where the table lives, such as
      ``NamedSharding(mesh, PartitionSpec("data"))``, split over examples; None
      for the default device.
    axis_name: inside ``jax.pmap`` (``jax.shard_map`` tells by types), the axis
      over which the state's table is split by rows, and the batch by examples.
      Ids stay those of the whole data set: predictions are gathered,
      n C numbers, and each device keeps those of its own rows.

  Extra args of ``update``:
    predictions: ``float [n, C]``, probabilities, one row an example. A row that
      is not finite, has a negative entry, or whose sum is not within 1/64 of one,
      is dropped and counted, so that logits never enter the table. 1/64 admits the
      rounding of bfloat16. With C = 1 the entry is a chance, in [0, 1].
    example_ids: ``int [n]``, each in [0, N), also a list or a column of pandas or
      Arrow; an id out of range, or beyond int32, is dropped, and counted unless it
      is -1 or missing, which stands for no example. Rows with the same id count as
      one visit with their mean. Pass 64-bit ids as NumPy arrays outside of
      ``jax.jit``, which cuts them to 32 bits before it calls anybody.

  Shapes:
    Any tree to the same tree, untouched. The state holds ``[N, C]``: 4 N C bytes
    in float32, 2 N C in bfloat16, divided by the number of devices where the
    table is split. Rows are zeros before the first visit, and sum to
    :math:`1 - \beta^v` after v visits.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * Only the rows of the given ids change.
    * Repeated ids count as one visit.
    * Non-finite predictions and ids out of range are dropped and counted.

  Raises:
    ValueError: for a decay outside [0, 1), another dtype, missing extra args, or
      shapes that do not fit.
    TypeError: for sizes that are not Python integers.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.smooth_predictions(3, 2, decay=0.75)
    >>> state = step.init({})
    >>> _, state = jax.jit(step.update)(
    ...     {}, state, predictions=jnp.array([[0.0, 1.0]]),
    ...     example_ids=jnp.array([1]))
    >>> print(ranger.smoothed_predictions(state))
    [[0.   0.  ]
     [0.   0.25]
     [0.   0.  ]]

    What ImageNet takes, in bytes:

    >>> for dtype in ("float32", "bfloat16"):
    ...   step = ranger.smooth_predictions(1_281_167, 1000, dtype=dtype)
    ...   table = jax.eval_shape(step.init, {}).smoothed
    ...   print(f"{table.size * table.dtype.itemsize:,}")
    5,124,668,000
    2,562,334,000

  References:
    Liu et al., Early-Learning Regularization Prevents Memorization of Noisy
    Labels, 2020, https://arxiv.org/abs/2007.00151, equation 9.
  """
  validate.static_count("num_examples", num_examples)
  validate.static_count("num_classes", num_classes)
  validate.in_range("decay", decay, 0, 1, open_high=True)
  validate.choice("dtype", dtype, ("float32", "bfloat16"))

  def init(params: PyTree) -> PredictionState:
    del params
    table = jnp.zeros([num_examples, num_classes], dtype)
    if sharding is not None:
      table = place(table, sharding)
    return PredictionState(
      count=numerics.zero_count(),
      num_dropped=numerics.zero_count(),
      smoothed=table,
    )

  def update(
    updates: PyTree,
    state: PredictionState,
    params: PyTree = None,
    *,
    predictions: Any = None,
    example_ids: Any = None,
    present: Any = True,
    **extra_args: Any,
  ) -> tuple[PyTree, PredictionState]:
    del params, extra_args
    validate.state(state, PredictionState, "smooth_predictions")
    validate.given("predictions", predictions, "smooth_predictions")
    validate.given("example_ids", example_ids, "smooth_predictions")
    new = jnp.asarray(predictions).astype(jnp.float32)
    ids = labels.read_ids("example_ids", example_ids)
    validate.shape("predictions", new, (ids.shape[0], num_classes))
    if gather_over := axis_name or axes_of(ids, new):
      ids, new = (gather_rows(part, gather_over) for part in (ids, new))
    good = jnp.logical_and(ids >= 0, ids < num_examples)
    good = jnp.logical_and(good, _is_probable(new))
    present = jnp.asarray(present).astype(bool)
    dropped = jnp.logical_and(ids != -1, jnp.logical_not(good))
    dropped = jnp.logical_and(dropped, present).sum(dtype=jnp.int32)
    good = jnp.logical_and(good, present)
    split_over = axis_name or axes_of(state.smoothed)
    rate = 1 - numerics.scalar(decay)
    visit = functools.partial(_visit, axis_name=split_over)
    smoothed = automatic(visit, state.smoothed, state.smoothed)(
      state.smoothed, state.count, ids, new, good, rate
    )
    return updates, PredictionState(
      count=numerics.increment(state.count, present),
      num_dropped=numerics.increment(state.num_dropped, dropped),
      smoothed=smoothed,
    )

  return transformation(init, update)


def smoothed_predictions(
  state: PyTree, example_ids: Any = None, *, axis_name: str | None = None
) -> Array:
  """Returns the table of smoothed predictions, or the rows of some examples.

  Args:
    state: an optimizer's state with one ``smooth_predictions`` anywhere in it.
    example_ids: ``int [n]``; None for the whole table as it is stored.
    axis_name: as in ``smooth_predictions``, inside ``jax.pmap``, where the table
      is split by rows; the ids are those of the whole data set.

  Returns:
    ``[N, C]`` in the table's type, or ``float32 [n, C]``; an id out of range has
    a row of zeros, as an example that was never visited.

  Raises:
    ValueError: when there is none, or more than one.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> tx = optax.chain(ranger.smooth_predictions(3, 2), optax.sgd(0.1))
    >>> state = tx.init({})
    >>> ranger.smoothed_predictions(state).shape
    (3, 2)
    >>> ranger.smoothed_predictions(state, jnp.array([2])).shape
    (1, 2)
  """
  found = list(find_states(state, lambda node: isinstance(node, PredictionState)))
  if len(found) != 1:
    raise ValueError(
      "smoothed_predictions needs a state with exactly one"
      f" smooth_predictions, got {len(found)}."
    )
  table = unboxed(found[0].smoothed)
  if example_ids is None:
    return table
  ids = labels.read_ids("example_ids", example_ids)
  split_over = axis_name or axes_of(table)
  if not split_over:
    return automatic(_rows, table, ids)(table, ids)
  apart = axis_name or axes_of(ids)
  everyone = gather_rows(ids, apart) if apart else ids
  rows = _rows(table, _local(everyone, table, split_over))
  rows = jax.lax.psum(rows, split_over)
  if not apart:
    return rows
  first = jax.lax.axis_index(apart) * ids.shape[0]
  return jax.lax.dynamic_slice_in_dim(rows, first, ids.shape[0])


def _is_probable(rows: Array) -> Array:
  """Which rows [n, C] are probabilities: not negative, with a sum of one."""
  finite = jnp.isfinite(rows).all(axis=1)
  rows = jnp.where(finite[:, None], rows, jnp.zeros_like(rows))
  total = rows.sum(axis=1)
  near = jnp.abs(total - 1) <= _TOLERANCE
  if rows.shape[1] == 1:
    near = total <= 1 + _TOLERANCE
  return finite & near & (rows >= 0).all(axis=1)


def _local(ids: Array, table: Array, axis_name: str | tuple[str, ...]) -> Array:
  """Ids of the whole data set as rows of this device's part of the table."""
  return ids - jax.lax.axis_index(axis_name) * table.shape[0]


def _rows(table: Array, ids: Array) -> Array:
  """The rows of these ids in float32, zeros for those out of range."""
  # Past the end: JAX would count negative indices from the end.
  ids = jnp.where(ids >= 0, ids, jnp.full_like(ids, table.shape[0]))
  rows = table.at[ids].get(mode="fill", fill_value=0)
  return rows.astype(jnp.float32)


def _visit(
  table: Array,
  count: Array,
  ids: Array,
  new: Array,
  good: Array,
  rate: Array,
  *,
  axis_name: str | tuple[str, ...] | None,
) -> Array:
  """The table after a visit of these ids."""
  everywhere = ids
  if axis_name:
    ids = _local(ids, table, axis_name)
  good = jnp.logical_and(good, jnp.logical_and(ids >= 0, ids < table.shape[0]))
  ids = jnp.where(good, ids, jnp.full_like(ids, table.shape[0]))
  new = jnp.where(good[:, None], new, jnp.zeros_like(new))
  new = _mean_of_equal_ids(ids, new)
  old = _rows(table, ids)
  moved = old + rate * (new - old)
  if table.dtype == jnp.bfloat16:
    # Rows of the same id draw the same bits: any of them may be written.
    key = jax.random.fold_in(jax.random.key(0), count)
    moved = _round_at_random(moved, key, everywhere)
  return table.at[ids].set(moved, mode="drop")


def _round_at_random(rows: Array, key: Array, ids: Array) -> Array:
  """Rounds to bfloat16, up or down, so that the mean over draws is the number."""
  draw = lambda id_: jax.random.bits(
    jax.random.fold_in(key, id_), rows.shape[1:], jnp.uint16
  )
  top = jnp.finfo(jnp.bfloat16).max.astype(jnp.float32)
  bits = jax.lax.bitcast_convert_type(jnp.clip(rows, -top, top), jnp.uint32)
  # bfloat16 is the upper half of float32: the lower half is the chance to go up.
  bits = (bits + jax.vmap(draw)(ids).astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
  return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def _mean_of_equal_ids(ids: Array, rows: Array) -> Array:
  """Replaces each row by the mean over the rows with its id, in O(n log n)."""
  n = ids.shape[0]
  if n == 0:
    return rows
  order = jnp.argsort(ids)
  ordered = ids[order]
  first = jnp.concatenate([jnp.ones([1], bool), ordered[1:] != ordered[:-1]])
  group = jnp.cumsum(first) - 1
  sums = jnp.zeros_like(rows).at[group].add(rows[order])
  sizes = jnp.zeros([n], rows.dtype).at[group].add(1)
  mean = sums[group] / sizes[group][:, None]
  return jnp.zeros_like(rows).at[order].set(mean)
