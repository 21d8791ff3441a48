"""Gradients of single losses, some at a time, and a part of every leaf at a time.

A step that is not linear needs all examples of an entry at once, but not all
entries: what is not kept of a leaf in one sweep over the examples is computed
again in another.
"""

from collections.abc import Callable
import contextlib
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import gramian as gramian_lib
from optax_ranger._core.members import keep_rows
from optax_ranger._core.sharding import per_row
from optax_ranger._core.sharding import vary
from optax_ranger._core.sharding import varying_axes
from optax_ranger._core.shards import axes_among
from optax_ranger._core.shards import vary_as
from optax_ranger._core.tree import finite_rows
from optax_ranger._core.tree import inner_product
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._gradients import linear
from optax_ranger._gradients.evaluated import Problem
from optax_ranger._gradients.evaluated import refuse_other_than_a_loss_each
from optax_ranger._gradients.options import Options

# Maps a function over the gradients of all examples, and stacks what it returns.
Sweep = Callable[[Callable[[PyTree], Any]], Any]


class Source(NamedTuple):
  """Where the gradients of single losses come from.

  Attributes:
    finite: ``bool [n]``, which losses can be used.
    sweep: over the gradients.
    weighted: ``(finite, weights) -> gradient`` of the weighted losses, in one pass.
  """

  finite: Array
  sweep: Sweep
  weighted: Callable[[Array, Array], PyTree]


class Stepped(NamedTuple):
  """A step over these gradients, and how to call it.

  Attributes:
    step: over examples or tasks.
    state: its state before.
    args_for: ``finite -> extra args``, of those that are.
    params: the parameters.
  """

  step: optax.GradientTransformationExtraArgs
  state: PyTree
  args_for: Callable[[Array], dict[str, Any]]
  params: PyTree


def of_examples(problem: Problem, options: Options) -> Source:
  """The gradients of a batch's examples, each computed by itself."""

  def weighted(finite: Array, weights: Array) -> PyTree:
    kept = problem.without(finite)
    losses, pull_back = jax.vjp(lambda p: kept.values(p)[0], problem.params)
    return pull_back(per_row(weights.astype(losses.dtype), losses))[0]

  sweep = _sweep(problem, options.micro_batch_size)
  return Source(problem.finite, sweep, weighted)


def of_tasks(
  losses: Array, pull_back: Callable[[Array], tuple[PyTree]], options: Options
) -> Source:
  """The gradients of losses that one forward pass has computed."""
  one = lambda i: pull_back(jnp.zeros_like(losses).at[i].set(1))[0]

  def sweep(visit):
    each = jnp.arange(losses.shape[0])
    return jax.lax.map(
      lambda i: visit(one(i)), each, batch_size=options.micro_batch_size
    )

  weighted = lambda finite, weights: pull_back(
    jnp.where(finite, weights.astype(losses.dtype), jnp.zeros_like(losses))
  )[0]
  return Source(jnp.isfinite(losses), sweep, weighted)


def run(
  source: Source, stepped: Stepped, options: Options
) -> tuple[PyTree, PyTree, Array]:
  """A step that is not linear, on the gradients of single losses.

  Returns:
    Its result, its new state, and ``bool [n]``, which gradients are finite.
  """
  step, state, args_for, params = stepped
  finite, sweep = source.finite, source.sweep
  n = finite.shape[0]
  if options.num_sweeps == 1:
    gradients = sweep(lambda gradient: gradient)
    finite = jnp.logical_and(finite, finite_rows(gradients, n))
    kept = jax.tree.map(lambda leaf: keep_rows(finite, leaf), gradients)
    return *step.update(kept, state, params, **args_for(finite)), finite
  finite_gradients, sizes = _finite_and_sizes(sweep)
  finite = jnp.logical_and(finite, finite_gradients)
  args = args_for(finite)
  about = linear.looks_at(step, n, state, args)
  gramian = functools.partial(_gramian_in_sweeps, sweep, params, options.num_sweeps)
  if about == "gramian":
    frame = gramian_lib.frame(sizes, args["member_weights"])
    too_far = jnp.logical_and(args["member_weights"] > 0, frame.weights == 0)
    finite = jnp.logical_and(finite, jnp.logical_not(too_far))
    args = {**args_for(finite), about: gramian(frame)}
  elif about == "directions":
    frame = gramian_lib.own_frame(sizes, args["member_weights"])
    args[about] = gramian_lib.directions(gramian(frame), frame, sizes)
  elif about == "norms":
    args[about] = norms(sweep)
  if about:
    with contextlib.suppress(linear.NotLinearError):
      weights = linear.transpose(step, n, state, args)
      leaf = vary(jnp.zeros([n], weights.dtype), varying_axes(weights))
      _, new_state = step.update(leaf, state, None, **args)
      return source.weighted(finite, weights), new_state, finite
  stepped = stepped._replace(args_for=lambda _: args)
  return *_update_in_sweeps(sweep, stepped, finite, options.num_sweeps), finite


def norms(sweep: Sweep) -> Array:
  """The norm of each whole gradient, [n]; infinite or NaN where it is."""
  return jnp.sqrt(sweep(lambda gradient: inner_product(gradient, gradient)))


def _sweep(problem: Problem, micro_batch_size: int) -> Sweep:
  """A sweep over the examples, `micro_batch_size` gradients at a time."""
  params = problem.params
  axes = axes_among(problem.batch)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    missing = ", ".join(repr(axis) for axis in axes - varying_axes(leaf))
    if missing:
      raise ValueError(
        f"params{jax.tree_util.keystr(path)} is the same over the mesh axis"
        f" {missing}, over which the batch differs: JAX would add up examples of"
        " different devices before the step. Mark the parameters with"
        " jax.lax.pcast(params, axis, to='varying'); the gradient is then local."
      )

  def sweep(visit):
    def one_example(rows):
      batch, by_row = jax.tree.map(lambda row: jnp.asarray(row)[None], rows)
      seen = {**problem.shared, **by_row}

      def loss(params):
        losses, _ = problem.losses(params, batch, seen)
        refuse_other_than_a_loss_each(losses, 1)
        return losses[0]

      return visit(jax.grad(loss)(params))

    rows = (problem.batch, problem.rows)
    return jax.lax.map(one_example, rows, batch_size=micro_batch_size)

  return sweep


def _finite_and_sizes(sweep: Sweep) -> tuple[Array, Array]:
  """Which gradients are finite, and the largest magnitude in each, [n] each."""

  def visit(gradient):
    row = jax.tree.map(lambda leaf: leaf[None], gradient)
    return finite_rows(row, 1)[0], gramian_lib.sizes(row, 1)[0]

  return sweep(visit)


def _gramian_in_sweeps(
  sweep: Sweep, params: PyTree, num_sweeps: int, frame: gramian_lib.Frame
) -> Array:
  """Inner products of the gradients, [n, n]."""
  n = frame.weights.shape[0]

  def one_sweep(index, total):
    rows = sweep(lambda gradient: jax.tree.map(_part(index, num_sweeps), gradient))
    for leaf, whole in zip(jax.tree.leaves(rows), jax.tree.leaves(params), strict=True):
      # Parts overlap at the end of a leaf; an entry counts once.
      start, width = _place(whole.size, index, num_sweeps)
      new = start + jnp.arange(width) >= index * width
      leaf = jnp.where(new[None], leaf, jnp.zeros_like(leaf))
      total = total + gramian_lib.of_leaf(leaf, frame).astype(total.dtype)
    return total

  start = jnp.zeros([n, n], frame.weights.dtype)
  start = vary(start, axes_among(params, frame.weights))
  return jax.lax.fori_loop(0, num_sweeps, one_sweep, start)


def _update_in_sweeps(
  sweep: Sweep, stepped: Stepped, finite: Array, num_sweeps: int
) -> tuple[PyTree, PyTree]:
  """The step's result, computed for a part of every leaf in each sweep."""
  step, state, args_for, params = stepped
  args = args_for(finite)
  linear.refuse_unless_entrywise(step, finite.shape[0], state, args)

  def one_sweep(index, carry):
    results, _ = carry
    rows = sweep(lambda gradient: jax.tree.map(_part(index, num_sweeps), gradient))
    rows = jax.tree.map(lambda leaf: keep_rows(finite, leaf), rows)
    parts, new_state = step.update(rows, state, None, **args)

    def write(whole, part):
      start, _ = _place(whole.size, index, num_sweeps)
      return jax.lax.dynamic_update_slice(whole, part, (start,))

    return jax.tree.map(write, results, parts), new_state

  axes = axes_among(params, finite, args)
  zeros = lambda leaf: vary(jnp.zeros([leaf.size], leaf.dtype), axes)
  flat = jax.tree.map(zeros, params)
  # The new state is the same in every sweep.
  _, shapes = jax.eval_shape(lambda carry: one_sweep(0, carry), (flat, state))
  start = (flat, vary_as(state, shapes))
  results, new_state = jax.lax.fori_loop(0, num_sweeps, one_sweep, start)
  shape = lambda part, leaf: part.reshape(leaf.shape)
  return jax.tree.map(shape, results, params), new_state


def _place(size: int, index: Any, num_sweeps: int) -> tuple[Any, int]:
  """Where a part of a leaf begins, and how long it is; the last ones overlap."""
  width = -(-size // num_sweeps)
  return jnp.minimum(index * width, size - width), width


def _part(index: Any, num_sweeps: int) -> Callable[[Array], Array]:
  def take(leaf: Array) -> Array:
    start, width = _place(leaf.size, index, num_sweeps)
    return jax.lax.dynamic_slice(leaf.reshape(-1), (start,), (width,))

  return take
