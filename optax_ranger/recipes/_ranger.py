"""The recipes `ranger_head` and `ranger`: all five steps in their order."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.tree import squared_norm
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import ScalarOrSchedule
from optax_ranger._core.types import Schedule
from optax_ranger._core.types import transformation
from optax_ranger.steps import _acceleration
from optax_ranger.steps import _accumulation
from optax_ranger.steps import _aggregation
from optax_ranger.steps import _averaging
from optax_ranger.steps import _ema
from optax_ranger.steps import _factor
from optax_ranger.steps import _guarding
from optax_ranger.steps import _noise_scale
from optax_ranger.steps import _predictions


def ranger_head(
  *, include_self: bool = True, normalize: str | None = "batch"
) -> optax.GradientTransformationExtraArgs:
  """Turns per-example gradients into one: neighbor averaging, then the mean.

  Made to be fused: give it to ``value_and_grad`` or ``example_weights``, and it
  costs one ordinary backward pass.

  Args:
    include_self: as in ``average_neighbors``.
    normalize: as in ``average_neighbors``.

  Extra args of ``update``:
    neighbors, member_weights, graph_weight, num_dropped: as in
      ``average_neighbors``.

  Shapes:
    ``[n, *shape]`` to ``[*shape]``. The state is two counters.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Examples:
    >>> import jax.numpy as jnp, optax_ranger as ranger
    >>> neighbors = ranger.neighbors.nearest(jnp.array([[0.0], [1.0], [9.0]]), 2)
    >>> neighbors = ranger.neighbors.weigh(
    ...     neighbors, labels=jnp.array([0, 0, 1]))
    >>> weights = ranger.example_weights(
    ...     ranger.ranger_head(), 3, neighbors=neighbors)
    >>> print(weights)  # nobody backs the third label
    [0.5 0.5 0. ]
  """
  return _named_chain(
    (
      "average_neighbors",
      _averaging.average_neighbors(include_self=include_self, normalize=normalize),
    ),
    ("aggregate", _aggregation.aggregate_by_mean()),
  )


def ranger(
  learning_rate: optax.ScalarOrSchedule,
  *,
  momentum: Scalar = 0.9,
  acceleration: Scalar = 1e-3,
  hyper_rate: Scalar = 0.05,
  bounds: tuple[Any, Any] = (1e-6, 1e6),
  weight_decay: float | Array = 0.0,
  weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
  clip_norm: Scalar | None = None,
  skip_spikes: Scalar | None = None,
  every: int | Schedule | _noise_scale.NoiseScaleRule = 1,
  ema_decay: ScalarOrSchedule | None = None,
  ema_warmup: Scalar = 10,
  num_examples: int | None = None,
  num_classes: int | None = None,
  prediction_decay: Scalar = 0.7,
) -> optax.GradientTransformationExtraArgs:
  r"""The Ranger of five steps, from the mean gradient on: steps 2, 3 and 5.

  Accumulates, accelerates (NGS), applies the learning rate and smooths, each in
  its place; steps 1 and 4 come before it, in ``ranger_head``. For the PyTorch
  optimizer of the same name see the README.

  Reads aloud as: smooth predictions, then accumulate (skip spikes, clip, scale by
  NGS, decay weights, scale by the learning rate, smooth by EMA).

  Args:
    learning_rate: a number, or a schedule of the optimizer step. While a schedule
      falls, the factor is held, as in ``scale_by_ngs``.
    momentum: as in ``scale_by_ngs``.
    acceleration: as in ``scale_by_ngs``: small, the start is from below. Take 1
      with a ``hyper_rate`` of 0, or with a learning rate that is known to be
      good and narrow ``bounds``.
    hyper_rate: as in ``scale_by_ngs``.
    bounds: as in ``scale_by_ngs``.
    weight_decay: multiplied with the learning rate and the parameters, apart
      from the gradient (decoupled), and not with the acceleration; 0 is none.
    weight_decay_mask: which parameters decay, as the mask of ``optax.adamw``: a
      tree of booleans that starts like the parameters, or a function from them
      to it; None for all.
    clip_norm: the largest global norm of the accumulated gradient, positive; a
      larger one is scaled down to it. None clips nothing.
    skip_spikes: the score above which an accumulated gradient is skipped, as the
      ``threshold`` of ``skip_anomalies``, which takes 6; None skips none.
    every: micro-batches in an optimizer step, as in ``accumulate``.
    ema_decay: decay of the smoothed parameters, as in ``smooth_by_ema``; None
      keeps none, and no memory.
    ema_warmup: its warm-up, by default 10: the average over n steps forgets the
      initial parameters, which a plain one still holds after a hundred. 0 is
      the plain one.
    num_examples: rows of the table of smoothed predictions, as in
      ``smooth_predictions``; None keeps none.
    num_classes: its columns; needed with ``num_examples``.
    prediction_decay: its decay.

  Extra args of ``update``:
    weight, last: as in ``accumulate``.
    predictions, example_ids: as in ``smooth_predictions``, with
      ``num_examples``.

  Shapes:
    Any tree to the same tree. The state holds the momentum and the accumulator,
    and with ``ema_decay`` the smoothed parameters: each of the parameters' size.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is addressed by
    name (``optax.named_chain``), so that a checkpoint survives the insertion of
    a step.

  Guarantees:
    * Without acceleration, accumulation and smoothing it is Nesterov SGD.
    * An option that is off has no entry in the state, and does not move the entries of
      others.
    * A non-finite gradient gives zeros and changes only a counter.

  Raises:
    ValueError: for arguments out of range, and for one of ``num_examples`` and
      ``num_classes`` without the other.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_ranger as ranger
    >>> tx = ranger.ranger(
    ...     0.5, momentum=0.0, acceleration=1.0, ema_decay=0.5)
    >>> params = jnp.array(1.0)
    >>> state = tx.init(params)
    >>> updates, state = jax.jit(tx.update)(jnp.array(4.0), state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(params)  # 1 - 0.5 * 4
    -1.0
    >>> print(f"{ranger.eval_params(state, params):.4f}")  # a tenth of 1 is left
    -0.8000
  """
  if (num_examples is None) != (num_classes is None):
    raise ValueError(
      "smoothed predictions need num_examples and num_classes, got"
      f" num_examples={num_examples!r} and num_classes={num_classes!r}."
    )
  hyper = _factor.Hyper(
    acceleration,
    hyper_rate,
    bounds,
    schedule=learning_rate if callable(learning_rate) else None,
    follows=True,
  )
  # With a mask in any case: the state is the same with one and without.
  mask = True if weight_decay_mask is None else weight_decay_mask
  inner: list[tuple[str, Any]] = []
  if clip_norm is not None:
    validate.in_range("clip_norm", clip_norm, 0, float("inf"), open_low=True)
    inner.append(("clip", _clip_by_norm(clip_norm)))
  inner += [
    ("ngs", _acceleration.ngs(momentum, hyper)),
    ("weight_decay", optax.add_decayed_weights(weight_decay, mask)),
    ("learning_rate", optax.scale_by_learning_rate(learning_rate)),
  ]
  if ema_decay is not None:
    inner.append(("ema", _ema.smooth_by_ema(ema_decay, warmup=ema_warmup)))
  window = _named_chain(*inner)
  if skip_spikes is not None:
    window = _guarded(window, skip_spikes)
  steps = []
  if num_examples is not None and num_classes is not None:
    table = _predictions.smooth_predictions(num_examples, num_classes, prediction_decay)
    steps.append(("predictions", table))
  steps.append(("accumulate", _accumulation.accumulate(window, every)))
  return _named_chain(*steps)


def _clip_by_norm(largest: Any) -> optax.GradientTransformation:
  """Clips by the global norm, which Optax computes in the gradient's own type."""

  def clip(updates: PyTree, params: PyTree) -> PyTree:
    del params
    norm = jnp.sqrt(squared_norm(updates))
    top = numerics.scalar(largest)
    # NGS skips what is not finite: divided by infinity it would be zero.
    clips = jnp.logical_and(norm > top, norm < jnp.inf)
    factor = jnp.where(clips, top / norm, jnp.ones_like(norm))
    scale = lambda u: u.astype(wide := numerics.wide(u.dtype)) * factor.astype(wide)
    return jax.tree.map(lambda u: scale(u).astype(u.dtype), updates)

  return optax.stateless(clip)


def _guarded(
  chain: optax.GradientTransformationExtraArgs, threshold: Any
) -> optax.GradientTransformationExtraArgs:
  """Skips spikes before a named chain; the guard's state stands beside the others.

  ``skip_anomalies`` holds its inner state inside its own, and the names in a
  checkpoint would be others with a guard than without.
  """
  guard: Any = _guarding.skip_anomalies(chain, threshold=threshold)

  def beside(state: _guarding.SkipState) -> PyTree:
    own = state._replace(inner_state=())
    return type(state.inner_state)(guard=own, **state.inner_state)

  def init(params: PyTree) -> PyTree:
    return beside(guard.init(params))

  def update(
    updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, PyTree]:
    inner = type(state)((name, part) for name, part in state.items() if name != "guard")
    around = state["guard"]._replace(inner_state=inner)
    updates, new = guard.update(updates, around, params, **extra_args)
    return updates, beside(new)

  return transformation(init, update)


def _named_chain(
  *steps: tuple[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
  """``optax.named_chain`` with a plain dictionary as its state.

  Flax serializes that one, not Optax's ``OrderedDict``.
  """
  chain: Any = optax.named_chain(*steps)

  def update(
    updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, PyTree]:
    updates, new_state = chain.update(updates, state, params, **extra_args)
    return updates, dict(new_state)

  return transformation(lambda params: dict(chain.init(params)), update)
