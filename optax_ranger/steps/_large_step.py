"""Learning rates for large steps, of a window that is fixed or changes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import transformation

# How a learning rate grows with the window.
_RULES = ("linear", "square_root")


def scale_by_window(rule: str = "square_root") -> optax.GradientTransformationExtraArgs:
  r"""Scales updates to the window of ``accumulate``, where its size changes.

  As ``large_step`` does for windows of a fixed size: the learning rate is then that
  for one micro-batch. Put it inside, after the optimizer and before smoothing.

  .. math::
    u' = \sqrt m \, u \quad (\text{square root}), \qquad
    u' = m \, u \quad (\text{linear})

  Args:
    rule: ``"square_root"``, usual for adaptive optimizers, or ``"linear"``, for SGD.

  Extra args of ``update``:
    micro_batches: the number of calls in the window, m. ``accumulate`` passes it.

  Shapes:
    Any tree to the same tree, and the same types. No state.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Raises:
    ValueError: for another rule, and outside of ``accumulate``.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> tx = ranger.accumulate(
    ...     optax.chain(optax.sgd(0.1), ranger.scale_by_window("linear")), every=2)
    >>> state = tx.init(jnp.array(0.0))
    >>> for _ in range(2):
    ...   update, state = tx.update(jnp.array(1.0), state)
    >>> print(update)  # -2 * 0.1 * 1
    -0.2

  References:
    As ``large_step``.
  """
  validate.choice("rule", rule, _RULES)

  def update(
    updates: PyTree,
    state: optax.EmptyState,
    params: PyTree = None,
    *,
    micro_batches: Any = None,
    **extra_args: Any,
  ) -> tuple[PyTree, optax.EmptyState]:
    del params, extra_args
    how = ", which accumulate does: put the step inside of it"
    validate.given("micro_batches", micro_batches, "scale_by_window", how)
    factor = numerics.scalar(micro_batches)
    factor = factor if rule == "linear" else jnp.sqrt(factor)

    def scale(leaf):
      wide = numerics.wide(leaf.dtype)
      return (factor.astype(wide) * leaf.astype(wide)).astype(leaf.dtype)

    return jax.tree.map(scale, updates), state

  return transformation(lambda params: optax.EmptyState(), update)


def large_step(learning_rate: Scalar, every: int, *, rule: str = "linear") -> Any:
  r"""Scales a learning rate that was found for one micro-batch to the large step.

  Where gradients are mostly noise, the linear rule is usual for SGD, and the square
  root for adaptive optimizers. For windows that change, see ``scale_by_window``.

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
  validate.choice("rule", rule, _RULES)
  factor = every if rule == "linear" else every**0.5
  if callable(learning_rate):
    return lambda count: factor * learning_rate(count)
  return factor * learning_rate
