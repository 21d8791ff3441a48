"""Step 2: m gradients become one large step."""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ranger._core import numerics
from optax_ranger._core import rounding
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.sharding import like_tree
from optax_ranger._core.sharding import vary
from optax_ranger._core.shards import axes_of
from optax_ranger._core.tree import all_finite
from optax_ranger._core.tree import squared_norm
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import transformation
from optax_ranger.steps import _noise_scale

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
    noise: with ``every=by_noise_scale(...)``, a ``NoiseScaleState``; else empty.
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
  noise: PyTree
  accumulated: PyTree
  inner_state: PyTree

  open_window = "accumulated"
  inside = "inner_state"
  idles = True


def accumulate(
  inner: optax.GradientTransformation,
  every: int | Callable[[Any], Any] | _noise_scale.NoiseScaleRule,
  *,
  reduce: str = "mean",
  accumulator_dtype: jax.typing.DTypeLike | None = "float32",
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
      number of optimizer steps taken, to a number of at least 1. Or
      ``by_noise_scale(...)``, which chooses it by the gradient noise.
    reduce: ``"mean"`` or ``"sum"`` over the window.
    accumulator_dtype: the least precise type to accumulate in; None to use the
      gradients'. Wider gradients (float64, complex) keep their type. With
      ``"bfloat16"``, float32 gradients too are added in bfloat16, 2 bytes a
      parameter: each sum, and what `inner` returns, is rounded up or down by chance,
      so that its expectation is exact.

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

    A name that looks like one of these, misspelled, is refused. `inner` gets all
    others of the call that closes the window, and ``micro_batches=``, the number of
    calls in it.

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
    ValueError: for ``every`` below 1, another ``reduce``, an ``accumulator_dtype``
      without fractions, a ``weight=`` or ``value=`` that is not one number, a state
      with a window where ``every`` is 1, or without one where it is not, the state of
      another rule, and gradients that differ from device to device under
      ``jax.shard_map`` where the accumulator does not: each device would decide
      alone. Reduce them first, or use ``micro_batched``, or ``train_step(...,
      reduce="on_emission")``.
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
  rule = every if isinstance(every, _noise_scale.NoiseScaleRule) else None
  if rule is None and not callable(every):
    validate.count("every", every)
  keeps = not (isinstance(every, int) and every == 1)
  validate.choice("reduce", reduce, ("mean", "sum"))
  if accumulator_dtype is not None and not jnp.issubdtype(
    accumulator_dtype, jnp.floating
  ):
    raise ValueError(
      f"accumulator_dtype must be a floating-point type or None, got"
      f" {accumulator_dtype!r}."
    )
  # The mean of one gradient is itself: nothing to add, nothing that overflows.
  only_guards = not keeps and reduce == "mean"
  inner = optax.with_extra_args_support(inner)

  def accumulator_type(leaf: Array) -> np.dtype:
    if accumulator_dtype is None:
      return leaf.dtype
    dtype = np.dtype(accumulator_dtype)
    # Where nothing is kept, there is nothing to save.
    halves = keeps and dtype == jnp.bfloat16
    if halves and numerics.wide(leaf.dtype) == np.float32:
      return dtype
    return numerics.widest(leaf.dtype, dtype)

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
      noise=() if rule is None else _noise_scale.start(rule),
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
    _check_window(state, updates, keeps, rule)
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
    apart = axes_of(*jax.tree.leaves(totals))
    finite, square = _all_finite(updates, rule is not None, bool(apart))
    good = jnp.logical_and(good, finite)
    if apart:  # All devices decide alike.
      bad = vary(jnp.logical_not(good).astype(jnp.int32), apart)
      good = jax.lax.psum(bad, apart) == 0
    left_out = jnp.logical_and(present, jnp.logical_not(good))
    good = jnp.logical_and(good, present)
    weight = jnp.where(good, weight, jnp.zeros_like(weight))
    weight_sum = state.weight_sum + weight
    noise = state.noise
    if rule is not None:
      num_parts = math.prod(jax.lax.axis_size(name) for name in apart)
      if apart:  # Each part is one of the sum, not of the mean.
        square = num_parts * jax.lax.psum(square, apart)
      noise = _noise_scale.add(noise, weight, square, num_parts)
      size = noise.every
    else:
      size = every(state.gradient_step) if callable(every) else every
    full = state.mini_step + 1 >= numerics.scalar(size, jnp.int32)
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
    calls = state.mini_step + present.astype(jnp.int32)
    extra_args["micro_batches"] = calls

    cast = _cast(totals, state, apart)

    # Weight, guard and divisor go into the one pass that adds: inside the
    # branch, a traced divisor would cost a buffer of the parameters' size.
    def add(total: Array, leaf: Array) -> Array:
      if only_guards:
        return jnp.where(good, leaf.astype(total.dtype), total)
      dtype = numerics.wide(total.dtype)
      total = total.astype(dtype)
      new = total + weight.astype(dtype) * leaf.astype(dtype)
      new = jnp.where(good, new, total)
      if reduce == "sum":
        return new
      one = jnp.ones([], numerics.real(dtype))
      mean = numerics.divide(one, weight_sum.astype(one.dtype))
      return new * jnp.where(emit, mean, one).astype(dtype)

    accumulated = cast(jax.tree.map(add, totals, updates))

    def look(now, total):
      # Of a sum in half precision, both at once would make XLA keep a wide copy.
      square = jnp.zeros([], jnp.float32)
      if rule is not None:
        square = jax.lax.cond(now, squared_norm, lambda total: square, total)
        if all(leaf.dtype != jnp.float16 for leaf in jax.tree.leaves(updates)):
          now = jnp.logical_and(now, jnp.logical_not(jnp.isfinite(square)))
      if only_guards:
        return jnp.asarray(True), square
      fits = lambda total: _fits(total, updates)
      return jax.lax.cond(now, fits, lambda total: jnp.asarray(True), total), square

    def run_inner(total, old):
      gradient = jax.tree.map(lambda a, u: a.astype(u.dtype), total, updates)
      result, new = inner.update(gradient, old, params, **extra_args)
      return like_tree(result, updates), like_tree(new, old)

    window = _Window(step_now, accumulated, state.inner_state)
    if apart:
      closed = _step_reduced(run_inner, look, window, updates, apart)
    else:
      closed = _step_in_place(run_inner, look, cast, window)
    stepped = closed.stepped
    emitted = jax.tree.map(lambda e, u: e.astype(u.dtype), closed.emitted, updates)
    unless_emitted = lambda leaf: jnp.where(emit, jnp.zeros_like(leaf), leaf)
    overflowed = jnp.logical_and(step_now, jnp.logical_not(stepped))
    if rule is not None:
      square = closed.square
      if reduce == "sum":
        square = numerics.divide(square, weight_sum.astype(square.dtype) ** 2)
      new = _noise_scale.close(rule, noise, weight_sum, square, calls)
      noise = jax.tree.map(lambda new, old: jnp.where(emit, new, old), new, noise)
    return like_tree(emitted, given), AccumulateState(
      mini_step=unless_emitted(calls),
      gradient_step=numerics.increment(state.gradient_step, stepped),
      weight_sum=unless_emitted(weight_sum),
      num_left_out=numerics.increment(state.num_left_out, left_out),
      num_overflowed=numerics.increment(state.num_overflowed, overflowed),
      value_sum=unless_emitted(value_sum),
      value_weight=unless_emitted(value_weight),
      noise=noise,
      accumulated=jax.tree.map(unless_emitted, closed.kept) if keeps else (),
      inner_state=closed.inner_state,
    )

  return transformation(init, update)


def _check_window(
  state: AccumulateState, updates: PyTree, keeps: bool, rule: Any
) -> None:
  """Refuses a state that has a window where this step has none, and the reverse."""
  if (rule is None) != (state.noise == ()):
    has, lacks = ("no rule", "one") if rule is None else ("a rule", "none")
    raise ValueError(
      f"accumulate with {has} for every=, but this state is from {lacks}: give it the"
      " field of a new one, state._replace(noise=tx.init(params).noise)."
    )
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


def _all_finite(updates: PyTree, wants_square: bool, apart: bool) -> tuple[Array, Any]:
  """Whether all entries are finite, and the squared norm where it is wanted."""
  if not wants_square:
    return all_finite(updates), None
  square = squared_norm(updates)
  if apart:
    return all_finite(updates), square
  # Of finite entries too, the squares may overflow; else one pass tells both.
  fine = lambda tree: jnp.asarray(True)
  return jax.lax.cond(jnp.isfinite(square), fine, all_finite, updates), square


def _cast(
  totals: PyTree, state: AccumulateState, apart: tuple[str, ...]
) -> Callable[..., PyTree]:
  """Casts a tree to the types of the sums, each time with another rounding."""
  wanted = jax.tree.leaves(totals)
  if all(leaf.dtype != jnp.bfloat16 for leaf in wanted):
    return lambda tree, _=0: jax.tree.map(lambda x, t: x.astype(t.dtype), tree, totals)
  # Leaves without entries draw nothing.
  numbers = np.cumsum([leaf.size > 0 for leaf in wanted])
  device = jax.lax.axis_index(apart) if apart else 0
  seed = rounding.seed(state.gradient_step, state.mini_step, device)

  def cast(tree, number=0):
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
      rounding.to(total.dtype, leaf, rounding.seed(seed, number, i))
      for leaf, total, i in zip(leaves, wanted, numbers, strict=True)
    )

  return cast


def _fits(total: PyTree, updates: PyTree) -> Array:
  """Whether the sum is finite, in the type of the gradients too."""
  # A cast first would be one more array, and only float16 has a smaller range.
  narrow, wide = [], []
  for a, u in zip(jax.tree.leaves(total), jax.tree.leaves(updates), strict=True):
    (narrow if u.dtype == jnp.float16 else wide).append(a)
  checks = [(jnp.abs(leaf) < _FLOAT16_ROUNDS_TO_INF).all() for leaf in narrow]
  return jnp.stack([all_finite(wide), *checks]).all()


_FLOAT16_ROUNDS_TO_INF = 65520


class _Window(NamedTuple):
  """A window: whether it makes a step now, its sum, and the state of `inner`."""

  step_now: Array
  accumulated: PyTree
  inner_state: PyTree


class _Closed(NamedTuple):
  """What became of it.

  Attributes:
    stepped: whether it made a step; not if the sum overflowed.
    square: the squared norm of the sum, where it is wanted and a step was due.
    emitted: the update, or zeros.
    kept: the sum, unless a step was due.
    inner_state: the state of `inner`.
  """

  stepped: Array
  square: Array
  emitted: PyTree
  kept: PyTree
  inner_state: PyTree


def _step_in_place(
  run_inner: Callable[..., Any],
  look: Callable[[Array, PyTree], tuple[Array, Array]],
  cast: Callable[..., PyTree],
  window: _Window,
) -> _Closed:
  """Takes the step if it is time and the sum fits."""
  # Conditionals after each other: one in the other would cost a buffer.
  fine, square = look(window.step_now, window.accumulated)
  stepped = jnp.logical_and(window.step_now, fine)

  # The inner update comes back in the accumulator's place, so that the
  # branches carry nothing else of the parameters' size.
  def step(carry):
    result, inner_state = run_inner(*carry)
    return cast(result, 1), inner_state

  carried, inner_state = jax.lax.cond(
    stepped, step, lambda carry: carry, (window.accumulated, window.inner_state)
  )
  emitted = jax.tree.map(lambda c: jnp.where(stepped, c, jnp.zeros_like(c)), carried)
  return _Closed(stepped, square, emitted, carried, inner_state)


def _step_reduced(
  run_inner: Callable[..., Any],
  look: Callable[[Array, PyTree], tuple[Array, Array]],
  window: _Window,
  updates: PyTree,
  apart: tuple[str, ...],
) -> _Closed:
  """The same where each device accumulates its part: they meet at the step only."""

  def wait(inner_state):
    zeros = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), updates)
    return jnp.asarray(False), jnp.zeros([], jnp.float32), zeros, inner_state

  def step(inner_state):
    wide = lambda leaf: leaf.astype(numerics.wide(leaf.dtype))
    total = jax.lax.psum(jax.tree.map(wide, window.accumulated), apart)
    fits, square = look(jnp.asarray(True), total)

    def run(inner_state):
      result, inner_state = run_inner(total, inner_state)
      result = jax.tree.map(lambda r, u: r.astype(u.dtype), result, updates)
      return jnp.asarray(True), square, result, inner_state

    return jax.lax.cond(fits, run, wait, inner_state)

  stepped, square, emitted, inner_state = jax.lax.cond(
    window.step_now, step, wait, window.inner_state
  )
  return _Closed(stepped, square, emitted, window.accumulated, inner_state)
