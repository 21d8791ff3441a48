"""Forms of a computation for one CPU, where XLA needs help, and for all else."""

from collections.abc import Callable
from typing import Any

import jax

from optax_ranger._core.types import Array


def for_one_cpu(
  leaf: Array, on_cpu: Callable[..., Any], elsewhere: Callable[..., Any]
) -> Callable[..., Any]:
  """The first form inside of jit on a CPU where no mesh is set, else the second."""
  # Outside of jit, both would be compiled at each call.
  eager = not isinstance(leaf, jax.core.Tracer)
  if eager or not jax.typeof(leaf).sharding.mesh.empty:
    return elsewhere
  return lambda *args: jax.lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere)
