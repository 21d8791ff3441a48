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


def _cnn() -> Model:
  """Two convolutions that halve the image, and a dense layer of 128."""
  channels = (1, 16, 32)

  def init(key, inputs):
    keys = jax.random.split(key, 4)
    side = -(-int(np.sqrt(inputs)) // 4)
    filters = [
      jax.random.normal(k, [5, 5, i, o]) * np.sqrt(2 / (25 * i))
      for k, (i, o) in zip(keys, itertools.pairwise(channels), strict=False)
    ]
    biases = [jnp.zeros([count]) for count in channels[1:]]
    hidden = _dense(keys[2], side * side * channels[-1], 128)
    convolutions = list(zip(filters, biases, strict=True))
    return {"layers": convolutions, "hidden": hidden, "head": _dense(keys[3], 128, 10)}

  def features(params, x):
    side = int(np.sqrt(x.shape[1]))
    x = x.reshape(-1, side, side, 1)
    for kernel, bias in params["layers"]:
      layout = ("NHWC", "HWIO", "NHWC")
      x = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=layout
      )
      x = jax.nn.relu(x + bias)
    kernel, bias = params["hidden"]
    return jax.nn.relu(x.reshape(len(x), -1) @ kernel + bias)

  return Model(init, features)


MODELS = {"mlp": _mlp(), "cnn": _cnn()}
