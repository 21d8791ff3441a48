"""Two small networks: parameters, and the features under the last layer."""

from collections.abc import Callable
import itertools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Model(NamedTuple):
  """A network in two parts.

  Attributes:
    init: parameters, by key and number of inputs.
    features: ``[n, d]`` to ``[n, width]``, what the last layer sees.
  """

  init: Callable[[jax.Array, int], Any]
  features: Callable[[Any, jax.Array], jax.Array]

  def logits(self, params: Any, images: jax.Array) -> jax.Array:
    kernel, bias = params["head"]
    return self.features(params, images) @ kernel + bias


def _dense(key: jax.Array, fan_in: int, fan_out: int) -> tuple[jax.Array, jax.Array]:
  kernel = jax.random.normal(key, [fan_in, fan_out]) * np.sqrt(2 / fan_in)
  return kernel, jnp.zeros([fan_out])


def _mlp() -> Model:
  def init(key, inputs):
    keys = jax.random.split(key, 3)
    sizes = itertools.pairwise([inputs, 256, 256, 10])
    layers = [_dense(k, i, o) for k, (i, o) in zip(keys, sizes, strict=True)]
    return {"layers": layers[:-1], "head": layers[-1]}

  def features(params, x):
    for kernel, bias in params["layers"]:
      x = jax.nn.relu(x @ kernel + bias)
    return x

  return Model(init, features)


def _patches(x: jax.Array) -> jax.Array:
  """Windows of 5 x 5 at every other place, ``[n, h, w, c]`` to ``[n, h/2, w/2, 25 c]``.

  Halves are rounded up. With them a convolution is one matrix product, as CPUs like it.
  """
  height, width = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
  shifts = itertools.product(range(5), repeat=2)
  return jnp.concatenate(
    [x[:, i : i + height : 2, j : j + width : 2] for i, j in shifts], axis=-1
  )


def _cnn() -> Model:
  """Two convolutions that halve the image, and a dense layer of 64."""
  channels = (1, 8, 16)

  def init(key, inputs):
    keys = jax.random.split(key, 4)
    side = -(-int(np.sqrt(inputs)) // 4)
    convolutions = [
      _dense(k, 25 * i, o)
      for k, (i, o) in zip(keys, itertools.pairwise(channels), strict=False)
    ]
    hidden = _dense(keys[2], side * side * channels[-1], 64)
    return {"layers": convolutions, "hidden": hidden, "head": _dense(keys[3], 64, 10)}

  def features(params, x):
    side = int(np.sqrt(x.shape[1]))
    x = x.reshape(-1, side, side, 1)
    for kernel, bias in params["layers"]:
      x = jax.nn.relu(_patches(x) @ kernel + bias)
    kernel, bias = params["hidden"]
    return jax.nn.relu(x.reshape(len(x), -1) @ kernel + bias)

  return Model(init, features)


MODELS = {"mlp": _mlp(), "cnn": _cnn()}
