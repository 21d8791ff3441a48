"""Attention in regions: `python -m benchmarks.speed.regions`."""

from flax import nnx
import jax
import jax.numpy as jnp

from benchmarks.speed import _measure
from optax_ranger import layers

_WIDTH, _HEADS = 64, 4


class _Attention(nnx.Module):
  """Self-attention over all cells of a grid."""

  def __init__(self, rngs: nnx.Rngs):
    self.attention = nnx.MultiHeadAttention(_HEADS, _WIDTH, decode=False, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    return self.attention(tokens).reshape(x.shape)


def attention_rows(rounds: int = 8, size: int = 64) -> list[_measure.Row]:
  """A grid of cells of width 64, in 4 x 4 regions, forward and backward."""
  regional = layers.RegionalAggregator(
    layers.Grid((4, 4)), _Attention, "mean", weights="learned", rngs=nnx.Rngs(0)
  )
  x = jax.random.normal(jax.random.key(0), [1, size, size, _WIDTH])
  contenders = []
  for model in (regional, _Attention(nnx.Rngs(0))):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x, rest, graphdef=graphdef):
      return jnp.square(nnx.merge(graphdef, params, rest)(x)).mean()

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    contenders.append(_measure.stateless(gradient, params, x, rest))
  seconds, rival = _measure.measure("attention", contenders, rounds)
  ours, theirs = contenders
  grid = f"{size} x {size} grid"
  return [
    _measure.Row(
      f"self-attention in 4 x 4 regions of a {grid}, forward and backward",
      "global attention",
      seconds,
      rival,
      "1/4 = 0.25",
      ours.temporaries,
      theirs.temporaries,
    )
  ]


if __name__ == "__main__":
  print(_measure.machine())
  print(_measure.table(attention_rows()))
