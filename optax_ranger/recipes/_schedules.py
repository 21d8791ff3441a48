"""Learning-rate schedules that Optax lacks."""

from typing import Any

import jax.numpy as jnp
import optax

from optax_ranger._core import numerics
from optax_ranger._core import validate
from optax_ranger._core.types import Array
from optax_ranger._core.types import Scalar


def geometric_restart_schedule(
  initial: Scalar, maximum: Scalar, period: Scalar
) -> optax.Schedule:
  r"""Makes a schedule that divides the rate by the same number at every restart.

  The rate is constant for ``period`` steps and then falls by
  :math:`\eta_0 / \eta_{max}`; with ``maximum = initial`` it never falls. For
  cosine warm restarts, see ``optax.sgdr_schedule``.

  .. math::
    \eta_t = \eta_0 \, (\eta_0 / \eta_{max})^{\lfloor t / T \rfloor}

  Args:
    initial: :math:`\eta_0`, the rate of the first period; positive.
    maximum: :math:`\eta_{max}`, at least ``initial``.
    period: :math:`T`, steps between restarts, a whole number of at least 1.

  Returns:
    A function from the number of the step to the rate, ``float32``.

  Raises:
    ValueError: for arguments out of range. Numbers that are traced pass.

  Examples:
    >>> import optax_ranger as ranger
    >>> schedule = ranger.geometric_restart_schedule(0.5, 1.0, period=10)
    >>> print(schedule(9), schedule(10), schedule(20))
    0.5 0.25 0.125
  """
  top = float("inf")
  validate.in_range("initial", initial, 0, top, open_low=True, open_high=True)
  validate.in_range("maximum", maximum, 0, top, open_low=True, open_high=True)
  if validate.is_known(initial) and validate.is_known(maximum):
    validate.in_range("maximum", maximum, float(initial), top, open_high=True)
  validate.count("period", period)

  def schedule(count: Any) -> Array:
    first = numerics.scalar(initial)
    ratio = first / numerics.scalar(maximum)
    # In integers: a float32 quotient is off by one beyond 2**24 steps.
    restarts = jnp.asarray(count).astype(jnp.int32) // jnp.asarray(period).astype(
      jnp.int32
    )
    return first * ratio ** restarts.astype(jnp.float32)

  return schedule
