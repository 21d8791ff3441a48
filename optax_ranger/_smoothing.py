"""Step 5: smooth the parameters and the predictions."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger import _numerics
from optax_ranger import _tree
from optax_ranger import _types
from optax_ranger import _validate


class EmaState(NamedTuple):
  """The state of ``smooth_by_ema``.

  Attributes:
    count: ``int32``, steps taken so far.
    ema: the smoothed parameters, in float32 or better.
  """

  count: _types.Array
  ema: _types.PyTree


class PredictionState(NamedTuple):
  """The state of ``smooth_predictions``.

  Attributes:
    num_dropped: ``int32``, predictions left out so far because they were not
      finite or their id was out of range.
    smoothed: ``float [num_examples, num_classes]``, zeros at first.
  """

  num_dropped: _types.Array
  smoothed: _types.Array


def smooth_by_ema(decay: Any) -> optax.GradientTransformationExtraArgs:
  r"""Keeps an exponential moving average of the parameters; updates pass through.

  Evaluate with ``eval_params(state, params)``. It helps where the last iterate
  is noisy; with a decay too near 1 for the length of the run it lags, since it
  starts at the initial parameters. Place it last in the chain, inside
  ``accumulate``: it must see the update that is applied, once an optimizer
  step.

  .. math:: \bar\theta_t = \beta \bar\theta_{t-1} + (1 - \beta) \theta_t

  Args:
    decay: :math:`\beta` in [0, 1). 0 keeps the parameters themselves; the
      average is over about :math:`1 / (1 - \beta)` steps.

  Shapes:
    Any tree to the same tree, untouched. The state holds one copy of the
    parameters in float32 or better, with their shardings.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its ``update`` needs
    ``params``.

  Guarantees:
    * Updates pass through untouched (``test_ema_passes_updates_through``).
    * ``decay=0`` keeps the new parameters (``test_ema_without_decay``).
    * Half-precision parameters move as float32 ones do
      (``test_ema_of_half_precision_moves``).
    * An entry that is not finite leaves its average alone
      (``test_nothing_poisons``).
    * The average shares no buffer with the parameters
      (``test_donation_of_state_and_params``).

  Raises:
    ValueError: for a decay outside [0, 1), and for a call without ``params``.
    TypeError: for parameters that hold integers.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> tx = optax.chain(optax.sgd(1.0), ranger.smooth_by_ema(0.75))
    >>> params = jnp.array(1.0)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jnp.array(-4.0), state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(params, ranger.eval_params(state, params))  # 3/4 * 1 + 1/4 * 5
    5.0 2.0

  References:
    Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging,
    1992, https://doi.org/10.1137/0330046
  """
  _validate.in_range("decay", decay, 0, 1, open_high=True)

  def init(params: _types.PyTree) -> EmaState:
    _validate.inexact_leaves("params", params, "smooth_by_ema")
    copy = lambda p: jnp.array(p, dtype=_numerics.wide(p.dtype), copy=True)
    return EmaState(count=_numerics.zero_count(), ema=jax.tree.map(copy, params))

  def update(
    updates: _types.PyTree,
    state: EmaState,
    params: _types.PyTree = None,
    **extra_args: Any,
  ) -> tuple[_types.PyTree, EmaState]:
    del extra_args
    if params is None:
      raise ValueError(
        "smooth_by_ema needs params: call update(updates, state, params)."
      )
    rate = 1 - _numerics.scalar(decay)

    def smooth(
      ema: _types.Array, update: _types.Array, param: _types.Array
    ) -> _types.Array:
      # The parameters as optax.apply_updates makes them, rounding included.
      new = param.astype(ema.dtype) + update.astype(ema.dtype)
      new = new.astype(param.dtype).astype(ema.dtype)
      moved = ema + rate.astype(ema.dtype) * (new - ema)
      return jnp.where(jnp.isfinite(moved), moved, ema)

    return updates, EmaState(
      count=_numerics.increment(state.count),
      ema=jax.tree.map(smooth, state.ema, updates, params),
    )

  return _types.transformation(init, update)


def eval_params(state: _types.PyTree, params: _types.PyTree) -> _types.PyTree:
  """Returns the parameters to evaluate with: smoothed ones, where there are any.

  Args:
    state: an optimizer's state; the smoothing may stand anywhere in it, inside
      ``optax.chain``, ``accumulate``, ``optax.masked`` and others.
    params: the parameters in training.

  Returns:
    A tree like `params`, with its types: each leaf smoothed if one of the
    states holds it, else the leaf of `params`.

  Raises:
    ValueError: when two states hold the same leaf.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> params = {"w": jnp.array(1.0)}
    >>> ranger.eval_params(optax.adam(0.1).init(params), params) is params
    True
  """
  masked = lambda node: isinstance(node, optax.MaskedNode)
  found = [node.ema for node in _tree.find_states(state, EmaState)]
  if not found:
    return params
  leaves, treedef = jax.tree.flatten(params)
  columns = [treedef.flatten_up_to(ema) for ema in found]
  chosen = []
  for leaf, *copies in zip(leaves, *columns, strict=True):
    copies = [copy for copy in copies if not masked(copy)]
    if len(copies) > 1:
      raise ValueError(
        f"the state holds {len(copies)} smoothed copies of one parameter of"
        f" shape {list(leaf.shape)}; keep one smooth_by_ema for each leaf."
      )
    chosen.append(copies[0].astype(leaf.dtype) if copies else leaf)
  return jax.tree.unflatten(treedef, chosen)


def smooth_predictions(
  num_examples: int, num_classes: int, decay: Any = 0.7
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps a smoothed prediction of every training example; updates pass through.

  Each visit of an example moves its row towards the prediction of that visit.
  Read the table with ``smoothed_predictions(state)`` and feed it to the next
  visit: in a regularizer, as a refined target, or as the beliefs of
  ``weigh_neighbors``. It helps where wrong labels are memorized late.

  .. math:: \tilde p_i \leftarrow \beta \tilde p_i + (1 - \beta) p_i

  Place it before ``accumulate`` or beside it: its inputs come with every
  micro-batch.

  Args:
    num_examples: rows of the table, N; a static Python integer.
    num_classes: columns of the table, C; a static Python integer.
    decay: :math:`\beta` in [0, 1). 0 keeps the last prediction.

  Extra args of ``update``:
    predictions: ``float [n, C]``, probabilities, one row an example. A row that
      is not finite is dropped.
    example_ids: ``int [n]``, each in [0, N); an id out of range is dropped.
      Rows with the same id count as one visit with their mean.

  Shapes:
    Any tree to the same tree, untouched. The state holds ``float32 [N, C]``:
    4 N C bytes. Rows are zeros before the first visit, and sum to
    :math:`1 - \beta^v` after v visits.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * Only the rows of the ids move (``test_only_visited_rows_move``).
    * Repeated ids count as one visit (``test_repeated_ids_are_one_visit``).
    * What is not finite or out of range is dropped and counted
      (``test_bad_predictions_are_dropped``).

  Raises:
    ValueError: for a decay outside [0, 1), missing extra args, or shapes that
      do not fit.
    TypeError: for sizes that are not Python integers.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> step = ranger.smooth_predictions(3, 2, decay=0.75)
    >>> state = step.init({})
    >>> _, state = step.update(
    ...     {}, state, predictions=jnp.array([[0.0, 1.0]]),
    ...     example_ids=jnp.array([1]))
    >>> print(ranger.smoothed_predictions(state))
    [[0.   0.  ]
     [0.   0.25]
     [0.   0.  ]]

  References:
    Liu et al., Early-Learning Regularization Prevents Memorization of Noisy
    Labels, 2020, https://arxiv.org/abs/2007.00151, equation 9.
  """
  _validate.static_count("num_examples", num_examples)
  _validate.static_count("num_classes", num_classes)
  _validate.in_range("decay", decay, 0, 1, open_high=True)

  def init(params: _types.PyTree) -> PredictionState:
    del params
    return PredictionState(
      num_dropped=_numerics.zero_count(),
      smoothed=jnp.zeros([num_examples, num_classes], jnp.float32),
    )

  def update(
    updates: _types.PyTree,
    state: PredictionState,
    params: _types.PyTree = None,
    *,
    predictions: Any = None,
    example_ids: Any = None,
    **extra_args: Any,
  ) -> tuple[_types.PyTree, PredictionState]:
    del params, extra_args
    _validate.given("predictions", predictions, "smooth_predictions")
    _validate.given("example_ids", example_ids, "smooth_predictions")
    new = jnp.asarray(predictions).astype(state.smoothed.dtype)
    ids = jnp.asarray(example_ids)
    _validate.integers("example_ids", ids)
    ids = ids.astype(jnp.int32)
    if ids.ndim != 1:
      raise ValueError(f"example_ids must have shape [n], got {list(ids.shape)}.")
    _validate.shape("predictions", new, (ids.shape[0], num_classes))
    good = jnp.logical_and(ids >= 0, ids < num_examples)
    good = jnp.logical_and(good, jnp.isfinite(new).all(axis=1))
    # Past the end: a scatter that drops wraps negative indices around first.
    ids = jnp.where(good, ids, jnp.full_like(ids, num_examples))
    new = jnp.where(good[:, None], new, jnp.zeros_like(new))
    new = _mean_of_equal_ids(ids, new)
    rate = 1 - _numerics.scalar(decay)
    old = state.smoothed.at[ids].get(mode="fill", fill_value=0)
    smoothed = state.smoothed.at[ids].set(old + rate * (new - old), mode="drop")
    dropped = jnp.logical_not(good).sum()
    return updates, PredictionState(
      num_dropped=_numerics.increment(state.num_dropped, dropped),
      smoothed=smoothed,
    )

  return _types.transformation(init, update)


def smoothed_predictions(state: _types.PyTree) -> _types.Array:
  """Returns the table of smoothed predictions, ``float32 [N, C]``.

  Args:
    state: an optimizer's state with one ``smooth_predictions`` anywhere in it.

  Raises:
    ValueError: when there is none, or more than one.

  Examples:
    >>> import optax, optax_ranger as ranger
    >>> tx = optax.chain(ranger.smooth_predictions(3, 2), optax.sgd(0.1))
    >>> ranger.smoothed_predictions(tx.init({})).shape
    (3, 2)
  """
  found = list(_tree.find_states(state, PredictionState))
  if len(found) != 1:
    raise ValueError(
      "smoothed_predictions needs a state with exactly one"
      f" smooth_predictions, got {len(found)}."
    )
  return found[0].smoothed


def _mean_of_equal_ids(ids: _types.Array, rows: _types.Array) -> _types.Array:
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
