"""Losses of papers on wrong labels, of logits [n, C] and labels [n]."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def generalized(
  logits: jax.Array, labels: jax.Array, exponent: Any, least: float = 1e-7
) -> jax.Array:
  """GCE, Zhang and Sabuncu, 2018, https://arxiv.org/abs/1805.07836."""
  return (1 - _chance(logits, labels, least) ** exponent) / exponent


def symmetric(
  logits: jax.Array,
  labels: jax.Array,
  forward: Any,
  reverse: Any,
  log_of_zero: float,
  least: float = 0.0,
) -> jax.Array:
  """SCE, Wang et al., 2019, https://arxiv.org/abs/1908.06112."""
  backward = -log_of_zero * (1 - _chance(logits, labels, least))
  return forward * cross_entropy(logits, labels) + reverse * backward


def _chance(logits: jax.Array, labels: jax.Array, least: float) -> jax.Array:
  chance = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=1)[:, 0]
  return jnp.maximum(chance, least) if least else chance
