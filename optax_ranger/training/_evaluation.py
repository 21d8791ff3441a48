"""`eval_params`: the parameters to evaluate with, found in any state."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ranger._core import numerics
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.tree import is_nnx_module
from optax_ranger._core.tree import leaves_like
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree


def eval_params(state: PyTree, params: PyTree) -> PyTree:
  """Returns the parameters to evaluate with: smoothed ones, where there are any.

  Args:
    state: an optimizer's state, or an ``nnx.Optimizer`` or ``TrainState`` that
      holds it. The smoothing may stand anywhere in it: inside ``optax.chain``,
      ``accumulate``, ``optax.masked``, ``optax.partition`` and others.
    params: the parameters in training; or an ``nnx.Module``, whose trained
      parameters are those of the ``nnx.Optimizer``, ``nnx.Param`` else.

  Returns:
    A tree like `params`, with its types: each leaf smoothed if one of the
    states holds it, else the leaf of `params`; `params` itself without any
    smoothing. Of a module, another module to evaluate: the one in training stays
    as it is.

  Raises:
    ValueError: when two states hold the same leaf; when the state holds plain
      dictionaries, as a checkpoint restored without a template does; and when a
      smoothed copy has another shape than its parameter.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> params = {"w": jnp.array(1.0)}
    >>> ranger.eval_params(optax.adam(0.1).init(params), params) is params
    True
  """
  if is_nnx_module(params):
    return _eval_module(state, params)
  copies = states.smoothed_copies(state)
  if not copies:
    _refuse_dictionaries(state)
    return params
  leaves, treedef = jax.tree.flatten(params)
  chosen = dict(enumerate(leaves))
  smoothed = set()
  for rate, copy in copies:
    for i, slow in enumerate(leaves_like(params, copy)):
      if slow is None:
        continue
      if i in smoothed:
        raise ValueError(
          "the state holds two smoothed copies of one parameter of shape"
          f" {list(leaves[i].shape)}: give eval_params the part of the state that"
          " holds the one to evaluate."
        )
      smoothed.add(i)
      chosen[i] = _evaluated(slow, leaves[i], rate)
  return jax.tree.unflatten(treedef, chosen.values())


def _refuse_dictionaries(state: PyTree) -> None:
  """Refuses what a checkpoint without a template restores: plain containers only."""
  is_tuple = lambda node: isinstance(node, tuple)
  nodes = jax.tree.leaves(state, is_leaf=is_tuple)
  if isinstance(state, dict | list) and nodes and not any(map(is_tuple, nodes)):
    raise ValueError(
      "state holds dictionaries and lists where an optimizer's state has named tuples,"
      " so a smoothed copy could not be told from the rest: restore it into a"
      " template, jax.eval_shape(optimizer.init, params)."
    )


def _eval_module(state: PyTree, model: Any) -> Any:
  """A copy of an NNX model, with smoothed parameters."""
  from flax import nnx

  trained = getattr(state, "wrt", nnx.Param)
  graph, params, rest = nnx.split(model, trained, ...)
  return nnx.merge(graph, eval_params(state, params), rest, copy=True)


def _evaluated(slow: Array, param: Array, rate: Array) -> Array:
  if slow.shape != param.shape or rate.shape != param.shape[: rate.ndim]:
    raise ValueError(
      f"the state holds a smoothed copy of shape {list(slow.shape)} for a parameter of"
      f" shape {list(param.shape)}: pass the parameters that it was made for."
    )
  # A state that was vmapped over models has a share for each.
  rate = jnp.expand_dims(rate, tuple(range(rate.ndim, param.ndim)))
  here = jax.typeof(param).sharding
  if jax.typeof(slow).sharding != here and not here.mesh.empty:
    # Of a state that is split; on concrete arrays no mesh need be set.
    known = validate.is_known(param)
    slow = jax.device_put(slow, param.sharding if known else here)
  mean = numerics.step_towards(slow, param, rate)
  mean = jnp.where(jnp.isfinite(mean), mean, slow).astype(param.dtype)
  return jnp.where(rate == 1, param, mean)
