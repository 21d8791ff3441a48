"""Gradients through a step over tasks: losses that belong to no row of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import gramian
from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.members import Members
from optax_ranger._core.members import aggregator
from optax_ranger._core.members import weighted_sum
from optax_ranger._core.shards import Shards
from optax_ranger._core.tree import all_finite
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._gradients import arguments
from optax_ranger._gradients import linear
from optax_ranger._gradients import per_example
from optax_ranger._gradients.evaluated import Evaluated
from optax_ranger._gradients.evaluated import Problem


def _mean(members: Members) -> Callable[[Array], Array]:
  total = members.weights.sum()
  return lambda leaf: numerics.divide(weighted_sum(members.weights, leaf), total)


# Where there is no step.
MEAN = aggregator(_mean)


def number_of(problem: Problem) -> int:
  """How many tasks there are: the length of the losses."""
  evaluate = lambda params: problem.losses(params, problem.batch, problem.shared)[0]
  shape = jax.eval_shape(evaluate, problem.params).shape
  if len(shape) != 1 or not shape[0]:
    raise ValueError(
      f"with over='tasks' the losses must have shape [tasks], got {list(shape)}: take"
      " the mean over the batch for each task, and jnp.stack these."
    )
  return shape[0]


def by_step(
  problem: Problem,
  step: optax.GradientTransformationExtraArgs,
  state: PyTree,
  plan: arguments.Plan,
) -> tuple[Evaluated, PyTree]:
  """The step over the tasks' gradients, in one backward pass where it is linear."""
  n = problem.finite.shape[0]
  shards, options = Shards(None, n), plan.options
  losses, pull_back, aux = jax.vjp(problem.values, problem.params, has_aux=True)
  source = per_example.of_tasks(losses, pull_back, options)

  def args_for(finite: Array) -> dict[str, Any]:
    known = arguments.Known(finite, losses, aux)
    return arguments.step_arguments(plan, arguments.gather(shards, plan, known))

  finite, told = source.finite, {}
  try:
    try:
      weights = linear.transpose(step, n, state, args_for(finite), plan.dtype)
    except linear.NotLinearError:
      match linear.looks_at(step, n, state, args_for(finite)):
        case "directions":
          found = _directions(problem, pull_back)
          norms, told = found.norms, {"directions": found}
        case "norms":
          norms = per_example.norms(source.sweep)
          told = {"norms": norms}
        case _:
          raise
      finite = jnp.logical_and(finite, jnp.isfinite(norms))
      args = args_for(finite) | told
      weights = linear.transpose(step, n, state, args, plan.dtype)
    grads = source.weighted(finite, weights)
    good = all_finite(grads)
    # What isn't finite in one task's part of the graph reaches what tasks share.
    finite = jnp.logical_and(finite, good)
    args = args_for(finite) | told
    _, state = step.update(jnp.zeros([n], plan.dtype), state, None, **args)
  except linear.NotLinearError:
    stepped = per_example.Stepped(step, state, args_for, problem.params)
    grads, state, finite = per_example.run(source, stepped, options)
    good = all_finite(grads)
  grads = jax.tree.map(lambda g: jnp.where(good, g, jnp.zeros_like(g)), grads)
  return Evaluated(losses, aux, {}, grads, finite), state


def _directions(
  problem: Problem, pull_back: Callable[[Array], tuple[PyTree]]
) -> gramian.Directions:
  """Norms and cosines of the tasks' gradients, of which one is held at a time.

  The derivatives of all losses along one gradient are its inner products with all
  gradients: what a pass in forward mode computes. The norm of a gradient that is not
  finite is infinite or NaN.
  """
  losses, push, _ = jax.linearize(problem.values, problem.params, has_aux=True)
  if not linear.has_forward_mode(push, problem.params):
    raise linear.NotLinearError("jax.custom_vjp has no forward mode.")
  dtype = numerics.widest(numerics.wide(losses.dtype))

  def one(i: Array) -> tuple[Array, Array]:
    (gradient,) = pull_back(jnp.zeros_like(losses).at[i].set(1))
    norm, direction = gramian.direction(gradient)
    along = push(jax.tree.map(jnp.conj, direction))
    return norm.astype(dtype), along.astype(dtype)

  norms, products = jax.lax.map(one, jnp.arange(losses.shape[0]))
  there = jnp.isfinite(norms)
  both = jnp.logical_and(there[:, None], there[None])
  cosines = jnp.where(both, numerics.divide(products, norms[None]), 0)
  return gramian.Directions(norms, jnp.clip((cosines + cosines.T) / 2, -1, 1))


def member_weights(extra_args: dict[str, Any], n: int) -> dict[str, Any]:
  """The one extra arg with a number for each task, if it is given."""
  given = extra_args.get("member_weights")
  if given is None:
    return {}
  validate.shape("member_weights", given, (n,))
  return {"member_weights": given}
