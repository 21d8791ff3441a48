"""A Linen `TrainState` whose `apply_gradients` forwards extra args."""

import dataclasses
import functools
from typing import Any

from flax.training import train_state
import optax


class TrainState(train_state.TrainState):
  """Flax's ``TrainState``, with extra args for the optimizer.

  Flax's own takes every further keyword of ``apply_gradients`` for a field to be
  replaced. Here those that are no fields go to ``tx.update``: ``value=``,
  ``weight=``, ``predictions=`` and others.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> from optax_ranger import layers
    >>> tx = ranger.accumulate(optax.sgd(1.0), every=2)
    >>> params = {"w": jnp.zeros([])}
    >>> state = layers.TrainState.create(apply_fn=None, params=params, tx=tx)
    >>> for gradient, weight in ((1.0, 3.0), (5.0, 1.0)):
    ...   grads = {"w": jnp.array(gradient)}
    ...   state = state.apply_gradients(grads=grads, weight=weight)
    >>> print(state.params["w"])  # less (3 * 1 + 1 * 5) / 4
    -2.0
  """

  def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
    """As Flax's; keywords that are no fields go to ``tx.update``.

    Args:
      grads: like ``params``.
      **kwargs: fields to be replaced, and extra args of the optimizer.

    Returns:
      The state after one step of the optimizer.
    """
    fields = {field.name for field in dataclasses.fields(self)}
    replaced = {name: arg for name, arg in kwargs.items() if name in fields}
    extra_args = {name: arg for name, arg in kwargs.items() if name not in fields}
    tx = optax.with_extra_args_support(self.tx)
    told = optax.GradientTransformationExtraArgs(
      tx.init, functools.partial(tx.update, **extra_args)
    )
    after = super(TrainState, self.replace(tx=told)).apply_gradients(
      grads=grads, **replaced
    )
    return after.replace(tx=replaced.get("tx", self.tx))
