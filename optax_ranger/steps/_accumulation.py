"""Step 2: m gradients become one large step."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.sharding import like_tree
from optax_ranger._core.sharding import vary
from optax_ranger._core.shards import axes_of
from optax_ranger._core.tree import all_finite
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import transformation

# What `update` takes for itself; other extra args go to the inner step.
_KNOWN = ("weight", "last", "value", "present")


@states.exportable
class AccumulateState(NamedTuple):
  """The state of ``accumulate``.

  Attributes:
    mini_step: ``int32``, micro-batches seen in the open window.
    gradient_step: ``int32``, optimizer steps taken so far.
    weight_sum: the weight of the open window, in float32 or better.
    num_left_out: ``int32``, micro-batches left out so far because their
      gradient or weight was not finite.
    num_overflowed: ``int32``, windows skipped so far because the sum of finite
      gradients was not finite.
    value_sum: the weighted sum of the open window's ``value=``.
    value_weight: the weight of those micro-batches that came with one.
    accumulated: the weighted sum of the open window's gradients; empty where every
      window is of one micro-batch.
    inner_state: the state of the inner transformation.
  """

  mini_step: Array
  gradient_step: Array
  weight_sum: Array
  num_left_out: Array
  num_overflowed: Array
  value_sum: Array
  value_weight: Array
  accumulated: PyTree
  inner_state: PyTree

  open_window = "accumulated"
  inside = "inner_state"
  idles = True


def accumulate(
  inner: optax.GradientTransformation,
  every: int | Callable[[Any], Any],
  *,
  reduce: str = "mean",
  accumulator_dtype: str | None = "float32",
) -> optax.GradientTransformationExtraArgs:
  r"""Accumulates gradients, and lets `inner` take one step for `every` of them.

  Other calls return zeros. Use it where a batch does not fit; a drop-in for
  ``optax.MultiSteps`` that runs `inner` on emission only, weighs micro-batches
  exactly, passes every other extra argument on, and cannot be poisoned by a NaN.

  .. math::
    G = \sum_j w_j g_j \, / \, \sum_j w_j \quad (\text{"mean"}), \qquad
    G = \sum_j w_j g_j \quad (\text{"sum"})

  Put everything that counts optimizer steps *inside*: schedules, weight decay,
  ``scale_by_ngs``, ``smooth_by_ema``. A smoothing step after ``accumulate`` in
  a chain would tick on zeros.

  Args:
    inner: the transformation of the large step; any optimizer.
    every: micro-batches in a window; 1 is `inner` itself. Or a function of the
      number of optimizer steps taken, to a number of at least 1.
    reduce: ``"mean"`` or ``"sum"`` over the window.
    accumulator_dtype: the least precise type to accumulate in; None to use the
      gradients'. Wider gradients (float64, complex) keep their type.

  Extra args of ``update``:
    weight: the micro-batch's weight (tokens, examples, a mask's sum), not
      negative; 1 when missing. A negative or non-finite one skips the
      micro-batch.
    present: False (it may be traced) where there is no micro-batch at all: nothing
      changes, and no window closes.
    last: True (it may be traced) closes the window now, at full magnitude.
    value: the micro-batch's loss, one number. `inner` gets the window's weighted
      mean, so that a guard in it sees a spike anywhere in the window. Without a
      window (``every=1``) it gets the value as it is.

    `inner` gets all others of the call that closes the window. A name that looks
    like one of these three, misspelled, is refused.

  Shapes:
    Any tree to the same tree; updates have the gradients' types. The state
    holds one accumulator of the parameters' size beside `inner`'s state, and none
    where ``every`` is the Python integer 1. Around AdamW a call takes 0.15 times
    that of ``optax.MultiSteps`` on a CPU, and 1.3 to 1.6 times on an H100, where XLA
    copies the accumulator (``benchmarks/README.md``).

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Guarantees:
    * With weights, the emission is the gradient of the sum of losses over the sum of
      weights, for any partition.
    * A non-finite micro-batch has weight zero and takes its place in the window.
    * A window of weight zero gives zeros and does not change the state of `inner`.

  Raises:
    ValueError: for ``every`` below 1, another ``reduce``, a ``weight=`` or
      ``value=`` that is not one number, a state with a window where ``every`` is
      1, or without one where it is not, and gradients that differ from device to
      device under ``jax.shard_map`` where the accumulator does not: each device
      would decide alone. Reduce them first, or use ``micro_batched``, or
      ``train_step(..., reduce="on_emission")``.
    TypeError: for parameters that hold integers, Python numbers or functions, for
      the state of another step, and for misspelled extra args.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> step = ranger.accumulate(optax.sgd(1.0), every=2)
    >>> state = step.init(jnp.array(0.0))
    >>> update, state = step.update(jnp.array(1.0), state, weight=3)
    >>> print(update)
    0.0
    >>> update, state = step.update(jnp.array(5.0), state, weight=1)
    >>> print(update)  # -(3 * 1 + 1 * 5) / 4
    -2.0
  """
  if not callable(every):
    validate.count("every", every)
  keeps = not (isinstance(every, int) and every == 1)
  validate.choice("reduce", reduce, ("mean", "sum"))
  # The mean of one gradient is itself: nothing to add, nothing that overflows.
  only_guards = not keeps and reduce == "mean"
  inner = optax.with_extra_args_support(inner)

  def accumulator_type(leaf: Array) -> np.dtype:
    if accumulator_dtype is None:
      return leaf.dtype
    return numerics.widest(leaf.dtype, accumulator_dtype)

  def start(tree: PyTree) -> PyTree:
    zeros = lambda leaf: jnp.zeros_like(leaf, dtype=accumulator_type(leaf))
    return jax.tree.map(zeros, tree)

  def init(params: PyTree) -> AccumulateState:
    validate.parameters(params, "accumulate")
    zeros = start(params)
    dtype = numerics.widest_real(zeros)
    return AccumulateState(
      mini_step=numerics.zero_count(),
      gradient_step=numerics.zero_count(),
      weight_sum=jnp.zeros([], dtype),
      num_left_out=numerics.zero_count(),
      num_overflowed=numerics.zero_count(),
      value_sum=jnp.zeros([], dtype),
      value_weight=jnp.zeros([], dtype),
      accumulated=zeros if keeps else (),
      inner_state=inner.init(params),
    )

  def update(
    updates: PyTree,
    state: AccumulateState,
    params: PyTree = None,
    *,
    weight: Any = None,
    last: Any = False,
    value: Any = None,
    present: Any = True,
    **extra_args: Any,
  ) -> tuple[PyTree, AccumulateState]:
    validate.state(state, AccumulateState, "accumulate")
    validate.spelling(extra_args, _KNOWN, "accumulate")
    _check_window(state, updates, keeps)
    weight = 1 if weight is None else weight
    validate.one_number("weight", weight, "single examples have member_weights=")
    validate.arrays("updates", updates, "accumulate")
    totals = state.accumulated if keeps else start(updates)
    validate.same_tree("updates", updates, totals, "accumulate")
    validate.reduced("updates", updates, totals, "accumulate")
    given, updates = updates, like_tree(updates, totals)
    present = jnp.asarray(present).astype(bool)
    weight = numerics.scalar(weight, state.weight_sum.dtype)
    good = jnp.logical_and(weight >= 0, weight < jnp.inf)
    good = jnp.logical_and(good, all_finite(updates))
    apart = axes_of(*jax.tree.leaves(totals))
    if apart:  # All devices decide alike.
      bad = vary(jnp.logical_not(good).astype(jnp.int32), apart)
      good = jax.lax.psum(bad, apart) == 0
    left_out = jnp.logical_and(present, jnp.logical_not(good))
    good = jnp.logical_and(good, present)
    weight = jnp.where(good, weight, jnp.zeros_like(weight))
    weight_sum = state.weight_sum + weight
    window = every(state.gradient_step) if callable(every) else every
    full = state.mini_step + 1 >= numerics.scalar(window, jnp.int32)
    emit = jnp.logical_or(full, jnp.asarray(last).astype(bool))
    emit = jnp.logical_and(emit, present)
    step_now = jnp.logical_and(emit, weight_sum > 0)
    value_sum, value_weight = state.value_sum, state.value_weight
    if value is not None and keeps:
      validate.one_number("value", value, "give the mean over the micro-batch")
      validate.reduced("value", value, value_sum, "accumulate")
      part = weight * numerics.scalar(value, weight.dtype)
      value_sum = value_sum + jnp.where(weight > 0, part, jnp.zeros_like(part))
      value_weight = value_weight + weight
      value = numerics.divide(value_sum, value_weight)
    if value is not None:
      extra_args["value"] = value

    # Weight, guard and divisor go into the one pass that adds: inside the
    # branch, a traced divisor would cost a buffer of the parameters' size.
    def add(total: Array, leaf: Array) -> Array:
      if only_guards:
        return jnp.where(good, leaf.astype(total.dtype), total)
      new = total + weight.astype(total.dtype) * leaf.astype(total.dtype)
      new = jnp.where(good, new, total)
      if reduce == "sum":
        return new
      one = jnp.ones([], numerics.real(total.dtype))
      mean = numerics.divide(one, weight_sum.astype(one.dtype))
      return new * jnp.where(emit, mean, one).astype(total.dtype)

    accumulated = jax.tree.map(add, totals, updates)

    def run_inner(total, old):
      gradient = jax.tree.map(lambda a, u: a.astype(u.dtype), total, updates)
      result, new = inner.update(gradient, old, params, **extra_args)
      return like_tree(result, updates), like_tree(new, old)

    if apart:
      stepped, emitted, kept, inner_state = _step_reduced(
        run_inner, step_now, accumulated, updates, state.inner_state, apart
      )
    else:
      fits = lambda total: jnp.asarray(True) if only_guards else _fits(total, updates)
      stepped, emitted, kept, inner_state = _step_in_place(
        run_inner, fits, step_now, accumulated, state.inner_state
      )
      emitted = jax.tree.map(lambda e, u: e.astype(u.dtype), emitted, updates)
    unless_emitted = lambda leaf: jnp.where(emit, jnp.zeros_like(leaf), leaf)
    overflowed = jnp.logical_and(step_now, jnp.logical_not(stepped))
    return like_tree(emitted, given), AccumulateState(
      mini_step=unless_emitted(state.mini_step + present.astype(jnp.int32)),
      gradient_step=numerics.increment(state.gradient_step, stepped),
      weight_sum=unless_emitted(weight_sum),
      num_left_out=numerics.increment(state.num_left_out, left_out),
      num_overflowed=numerics.increment(state.num_overflowed, overflowed),
      value_sum=unless_emitted(value_sum),
      value_weight=unless_emitted(value_weight),
      accumulated=jax.tree.map(unless_emitted, kept) if keeps else (),
      inner_state=inner_state,
    )

  return transformation(init, update)


def _check_window(state: AccumulateState, updates: PyTree, keeps: bool) -> None:
  """Refuses a state that has a window where this step has none, and the reverse."""
  has_window = bool(jax.tree.leaves(state.accumulated))
  if has_window == keeps or not jax.tree.leaves(updates):
    return
  one, other = (
    ("every=1 holds no window", "one")
    if has_window
    else ("every of more than 1 needs a window", "none")
  )
  raise ValueError(
    f"accumulate with {one}, but this state has {other}: it is from another every=."
    " Close an open window with the step that made it (last=True), then go on with"
    " tx.init(params)._replace(inner_state=state.inner_state)."
  )


def _fits(total: PyTree, updates: PyTree) -> Array:
  """Whether the sum is finite, in the type of the gradients too."""
  # A cast first would be one more array, and only float16 has a smaller range.
  narrow, wide = [], []
  for a, u in zip(jax.tree.leaves(total), jax.tree.leaves(updates), strict=True):
    (narrow if u.dtype == jnp.float16 else wide).append(a)
  checks = [(jnp.abs(leaf) < _FLOAT16_ROUNDS_TO_INF).all() for leaf in narrow]
  return jnp.stack([all_finite(wide), *checks]).all()


_FLOAT16_ROUNDS_TO_INF = 65520


def _step_in_place(
  run_inner: Callable[..., Any],
  fits: Callable[[PyTree], Array],
  step_now: Array,
  accumulated: PyTree,
  inner_state: PyTree,
) -> tuple[Array, PyTree, PyTree, PyTree]:
  """Takes the step if it is time and the sum fits.

  Returns:
    Whether it did, what to emit, what to keep unless it did, the inner state.
  """
  # Two conditionals after each other: one in the other would cost a buffer.
  fine = jax.lax.cond(step_now, fits, lambda total: jnp.asarray(True), accumulated)
  stepped = jnp.logical_and(step_now, fine)

  # The inner update comes back in the accumulator's place, so that the
  # branches carry nothing else of the parameters' size.
  def step(carry):
    total, inner_state = carry
    result, inner_state = run_inner(total, inner_state)
    result = jax.tree.map(lambda r, a: r.astype(a.dtype), result, total)
    return result, inner_state

  carried, inner_state = jax.lax.cond(
    stepped, step, lambda carry: carry, (accumulated, inner_state)
  )
  emitted = jax.tree.map(lambda c: jnp.where(stepped, c, jnp.zeros_like(c)), carried)
  return stepped, emitted, carried, inner_state


def _step_reduced(
  run_inner: Callable[..., Any],
  step_now: Array,
  accumulated: PyTree,
  updates: PyTree,
  inner_state: PyTree,
  apart: tuple[str, ...],
) -> tuple[Array, PyTree, PyTree, PyTree]:
  """The same where each device accumulates its part: they meet at the step only."""

  def wait(inner_state):
    zeros = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), updates)
    return jnp.asarray(False), zeros, inner_state

  def step(inner_state):
    total = jax.lax.psum(accumulated, apart)

    def run(inner_state):
      result, inner_state = run_inner(total, inner_state)
      result = jax.tree.map(lambda r, u: r.astype(u.dtype), result, updates)
      return jnp.asarray(True), result, inner_state

    return jax.lax.cond(_fits(total, updates), run, wait, inner_state)

  stepped, emitted, inner_state = jax.lax.cond(step_now, step, wait, inner_state)
  return stepped, emitted, accumulated, inner_state


def large_step(learning_rate: Scalar, every: int, *, rule: str = "linear") -> Any:
  r"""Scales a learning rate that was found for one micro-batch to the large step.

  The sources give the accumulated step a rate of its own, :math:`\eta'`; these
  are the two rules that the field uses for it. Where gradients are mostly noise
  the linear one is usual for SGD; the square root, for adaptive optimizers.

  .. math::
    \eta' = m \, \eta \quad (\text{linear}), \qquad
    \eta' = \sqrt m \, \eta \quad (\text{square root})

  Args:
    learning_rate: a number, or a schedule of the optimizer step.
    every: micro-batches in a step, m.
    rule: ``"linear"`` or ``"square_root"``.

  Returns:
    A number, or a schedule, as was given.

  Raises:
    ValueError: for ``every`` below 1 and another rule.

  Examples:
    >>> import optax_ranger as ranger
    >>> tx = ranger.ranger(ranger.large_step(0.01, every=4), every=4)
    >>> ranger.large_step(0.01, every=4)
    0.04

  References:
    Goyal et al., Accurate, Large Minibatch SGD, 2017,
    https://arxiv.org/abs/1706.02677, section 2.1; Krizhevsky, One weird trick
    for parallelizing convolutional neural networks, 2014,
    https://arxiv.org/abs/1404.5997, section 5.
  """
  validate.count("every", every)
  validate.choice("rule", rule, ("linear", "square_root"))
  factor = every if rule == "linear" else every**0.5
  if callable(learning_rate):
    return lambda count: factor * learning_rate(count)
  return factor * learning_rate
