"""Small networks in Flax NNX, each with the features under its last layer."""

import functools
import itertools
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

_scaled = functools.partial(nnx.Linear, kernel_init=nnx.initializers.he_normal())


class Mlp(nnx.Module):
  """Hidden layers with ReLU; none of them is a linear model."""

  def __init__(
    self, inputs: int, outputs: int, widths: tuple[int, ...], rngs: nnx.Rngs
  ):
    pairs = itertools.pairwise((inputs, *widths))
    self.hidden = nnx.List([_scaled(i, o, rngs=rngs) for i, o in pairs])
    self.head = _scaled((inputs, *widths)[-1], outputs, rngs=rngs)

  def features(self, x: jax.Array) -> jax.Array:
    for layer in self.hidden:
      x = jax.nn.relu(layer(x))
    return x

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.head(self.features(x))


class Cnn(nnx.Module):
  """Two convolutions that halve a square gray image, and a dense layer of 64."""

  def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
    self.side = round(inputs**0.5)
    channels = ((1, 8), (8, 16))
    self.layers = nnx.List([_scaled(25 * i, o, rngs=rngs) for i, o in channels])
    self.hidden = _scaled((-(-self.side // 4)) ** 2 * 16, 64, rngs=rngs)
    self.head = _scaled(64, outputs, rngs=rngs)

  def features(self, x: jax.Array) -> jax.Array:
    x = x.reshape(-1, self.side, self.side, 1)
    for layer in self.layers:
      x = jax.nn.relu(layer(patches(x)))
    return jax.nn.relu(self.hidden(x.reshape(len(x), -1)))

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.head(self.features(x))


def patches(x: jax.Array) -> jax.Array:
  """Windows of 5 x 5 at every other place, ``[n, h, w, c]`` to ``[n, h/2, w/2, 25 c]``.

  Halves are rounded up. A convolution becomes one matrix product: fast on CPUs.
  """
  height, width = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
  shifts = itertools.product(range(5), repeat=2)
  return jnp.concatenate(
    [x[:, i : i + height : 2, j : j + width : 2] for i, j in shifts], axis=-1
  )


MODELS = {
  "mlp": functools.partial(Mlp, widths=(256, 256)),
  "small": functools.partial(Mlp, widths=(64,)),
  "linear": functools.partial(Mlp, widths=()),
  "cnn": Cnn,
}


class Network(NamedTuple):
  """A model as functions of its parameters, for the compiled parts of a study."""

  name: str
  inputs: int
  outputs: int

  def init(self, seed: int) -> Any:
    return nnx.state(self.build(nnx.Rngs(seed)), nnx.Param)

  def logits(self, params: Any, x: jax.Array) -> jax.Array:
    return nnx.merge(_graph(self), params)(x)

  def features(self, params: Any, x: jax.Array) -> jax.Array:
    return nnx.merge(_graph(self), params).features(x)

  def build(self, rngs: nnx.Rngs) -> Any:
    return MODELS[self.name](self.inputs, self.outputs, rngs=rngs)


@functools.cache
def _graph(network: Network) -> Any:
  return nnx.graphdef(nnx.eval_shape(lambda: network.build(nnx.Rngs(0))))
