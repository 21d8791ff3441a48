"""Step 3, NGS: Nesterov gradient scaling with a learned acceleration factor."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ranger._core import numerics
from optax_ranger._core import parts
from optax_ranger._core import replay
from optax_ranger._core import states
from optax_ranger._core import validate
from optax_ranger._core.sharding import like_tree
from optax_ranger._core.types import Array
from optax_ranger._core.types import PyTree
from optax_ranger._core.types import Scalar
from optax_ranger._core.types import Schedule
from optax_ranger._core.types import transformation
from optax_ranger.steps import _factor


@states.exportable
class NgsState(NamedTuple):
  """The state of ``scale_by_ngs``.

  Attributes:
    count: ``int32``, steps taken so far.
    num_skipped: ``int32``, updates skipped so far because the gradient, or its
      squared norm in float32, was not finite.
    factor: the learned factor, ``acceleration``, and what it needs.
    momentum: the sum of past gradients, decayed.
  """

  count: Array
  num_skipped: Array
  factor: _factor.Factor
  momentum: PyTree


def scale_by_ngs(
  momentum: Scalar = 0.9,
  *,
  acceleration: Scalar = 1e-3,
  hyper_rate: Scalar = 0.05,
  shrink: Scalar = 0.2,
  hurry: Scalar = 10.0,
  bounds: tuple[Any, Any] = (1e-6, 1e6),
  per_leaf: bool = False,
  schedule: Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Scales Nesterov's direction with an acceleration factor learned on the way.

  The factor grows while the gradient agrees with the momentum and shrinks when
  it turns against it, so the learning rate after it is a unit more than a
  choice. It starts from below, in a hurry, and is divided at once when the
  gradient turns around and outgrows what is usual: an explosion. Pass a schedule
  as ``schedule``: one that comes after it is in part undone, since the factor
  makes up for it.

  A leaf of at least 65,536 entries is looked at in parts, an eighth of it or
  less, another one at each step: inner products are sums over that part, times
  the number of parts. Whether the gradient is finite is checked for all entries.

  .. math::
    c_t &= \cos(g_t, m_{t-1}), \qquad
    e_t = \max\big(1, -c_t \, |g_t| / \bar g_{t-1}\big) \\
    a_t &= \mathrm{clip}\big(
      a_{t-1} \exp(\beta h_t \, (c_t^+ - \sigma c_t^-)) / e_t, lo, hi\big) \\
    m_t &= \mu m_{t-1} + g_t \\
    u_t &= s_t \, a_t \, (g_t + \mu m_t)

  with :math:`\bar g` the running root mean square of the gradient's norm, and
  the hurry :math:`h_t = \max(1, h_{t-1} 2^{-c_t^- / 2})`, or 1 from an
  explosion on.

  Args:
    momentum: :math:`\mu` in [0, 1). 0 is plain gradient descent, and then only
      the last gradient's agreement with this one counts.
    acceleration: :math:`a_0`, positive; at most ``bounds[1]`` and at least
      ``bounds[0]``. Small, so that a learning rate too large is met from below;
      a start at 1 can destroy the parameters before the factor is down.
    hyper_rate: :math:`\beta`, not negative; 0 keeps the factor fixed.
    shrink: :math:`\sigma` in (0, 1], how fast the factor shrinks, as a share of
      how fast it grows. With 1 noise makes the rate bleed away.
    hurry: :math:`h_0`, at least 1: the multiple of ``hyper_rate`` at the start.
    bounds: :math:`(lo, hi)`, positive.
    per_leaf: whether each leaf learns a factor of its own.
    schedule: :math:`s`, of the number of the step: multiplies the updates. While
      it falls, the factor is held once its start is over, when the hurry is 1, so
      that the updates follow the schedule; only an explosion still divides it.
      A rate that is held and then decays, such as ``optax.linear_schedule(1.0,
      0.0, steps // 2, steps // 2)``, leaves the factor time to find its place.

  Shapes:
    Any tree to the same tree, types kept. The state holds the momentum, of the
    parameters' size in float32 or better, and five scalars; with ``per_leaf``
    three of them are trees of one scalar a leaf.

  Returns:
    An ``optax.GradientTransformationExtraArgs``. Read the factor with
    ``optax.tree.get(state, "acceleration")``.

  Guarantees:
    * ``hyper_rate=0`` equals ``optax.sgd`` with Nesterov momentum, times the
      acceleration.
    * The factor is positive, finite and within bounds for any gradients.
    * A non-finite gradient gives zeros and changes only a counter.

  Raises:
    ValueError: for arguments out of range, and for gradients that differ from
      device to device under ``jax.shard_map``.
    TypeError: for parameters that hold integers, Python numbers or functions, and
      for the state of another step.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> step = ranger.scale_by_ngs(0.5, acceleration=1.0, hyper_rate=0.1, hurry=1.0)
    >>> gradient = jnp.array(1.0)
    >>> state = step.init(gradient)
    >>> _, state = step.update(gradient, state)  # no momentum yet: cosine 0
    >>> update, state = step.update(gradient, state)  # cosine 1
    >>> print(f"{optax.tree.get(state, 'acceleration'):.4f}")
    1.1052
    >>> print(f"{update:.4f}")  # exp(0.1) * (1 + 0.5 * 1.5)
    1.9340
    >>> _, state = step.update(-8 * gradient, state)  # an explosion: e = 8
    >>> print(f"{optax.tree.get(state, 'acceleration'):.4f}")  # exp(0.08) / 8
    0.1354

  References:
    Baydin et al., Online Learning Rate Adaptation with Hypergradient Descent,
    2018, https://arxiv.org/abs/1703.04782, equations 7 and 8 (SGDN-HD); here
    multiplicative, bounded and free of scale.
  """
  hyper = _factor.Hyper(
    acceleration, hyper_rate, bounds, shrink, hurry, per_leaf, schedule
  )
  return ngs(momentum, hyper)


def ngs(
  momentum: Scalar, hyper: _factor.Hyper
) -> optax.GradientTransformationExtraArgs:
  """``scale_by_ngs``, of the hyperparameters of its factor."""
  validate.in_range("momentum", momentum, 0, 1, open_high=True)
  hyper.check()

  def init(params: PyTree) -> NgsState:
    validate.parameters(params, "scale_by_ngs")
    return NgsState(
      count=numerics.zero_count(),
      num_skipped=numerics.zero_count(),
      factor=hyper.init(params),
      momentum=jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=numerics.wide(p.dtype)), params
      ),
    )

  def update(
    updates: PyTree,
    state: NgsState,
    params: PyTree = None,
    **extra_args: Any,
  ) -> tuple[PyTree, NgsState]:
    del params, extra_args
    validate.state(state, NgsState, "scale_by_ngs")
    validate.same_tree("updates", updates, state.momentum, "scale_by_ngs")
    validate.reduced("updates", updates, state.momentum, "scale_by_ngs")
    decay_of = lambda leaf: numerics.scalar(momentum, leaf.dtype)
    given, updates = updates, like_tree(updates, state.momentum)
    products = _products(hyper, updates, state.momentum, state.count)
    good = _factor.all_finite(products)
    # The new momentum depends on all that reads the old one, or XLA copies it.
    good = jnp.logical_and(good, parts.all_finite(updates))
    factor = hyper.advance(state.factor, products, good, state.count)

    def advance(m: Array, g: Array) -> Array:
      new = g.astype(m.dtype) + decay_of(m) * m
      return jnp.where(good, new, m)

    def direct(a: Array, m: Array, g: Array) -> Array:
      dtype = numerics.wide(g.dtype)
      ahead = g.astype(dtype) + decay_of(m).astype(dtype) * m.astype(dtype)
      return numerics.scaled(a, ahead, g.dtype, good)

    new_momentum = jax.tree.map(advance, state.momentum, updates)
    multiples = hyper.multiples(factor, updates, state.count)
    new_state = NgsState(
      count=numerics.increment(state.count, good),
      num_skipped=numerics.increment(state.num_skipped, jnp.logical_not(good)),
      factor=factor,
      momentum=new_momentum,
    )
    results = jax.tree.map(direct, multiples, new_momentum, updates)
    return like_tree(results, given), new_state

  return transformation(init, update)


@states.exportable
class AccelerateState(NamedTuple):
  """The state of ``accelerate``.

  Attributes:
    count: ``int32``, steps taken so far.
    num_skipped: ``int32``, updates skipped so far because the gradient, or its
      squared norm in float32, was not finite.
    factor: the learned factor, ``acceleration``, and what it needs.
    direction_norm: ``float32``, the squared norm of the last direction.
    direction: what the inner optimizer last gave, before the factor; of a large
      leaf, the part that the next step looks at.
    inner_state: the state of the inner optimizer.
  """

  count: Array
  num_skipped: Array
  factor: _factor.Factor
  direction_norm: PyTree
  direction: PyTree
  inner_state: PyTree


def accelerate(
  inner: optax.GradientTransformation,
  *,
  acceleration: Scalar = 1e-3,
  hyper_rate: Scalar = 0.05,
  shrink: Scalar = 0.2,
  hurry: Scalar = 14.0,
  bounds: tuple[Any, Any] = (1e-6, 1e6),
  per_leaf: bool = False,
  schedule: Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Scales what any optimizer gives with the learned factor of ``scale_by_ngs``.

  With :math:`d_t` the inner optimizer's update, learning rate and all, the loss
  changes with the factor of the last step as :math:`\langle g_t, d_{t-1} \rangle`:
  that holds for Adam's or Muon's directions as well, which are no gradients. So
  the factor grows while the gradient still points against the last update. What
  is inside is scaled as a whole, its weight decay and its schedule too.

  .. math::
    c_t &= \cos(-g_t, d_{t-1}) \\
    a_t &= \mathrm{clip}\big(
      a_{t-1} \exp(\beta h_t \, (c_t^+ - \sigma c_t^-)) / e_t, lo, hi\big) \\
    u_t &= s_t \, a_t \, d_t

  with :math:`e_t`, :math:`h_t` and :math:`s_t` as in ``scale_by_ngs``.

  Args:
    inner: any optimizer whose updates are to be added to the parameters. Inside
      ``accumulate`` the order is ``accumulate(accelerate(inner), every)``: the
      factor then advances on emission only.
    acceleration: as in ``scale_by_ngs``.
    hyper_rate: as in ``scale_by_ngs``.
    shrink: as in ``scale_by_ngs``.
    hurry: as in ``scale_by_ngs``, but larger by default: most optimizers bound
      their updates. Around SGD, which does not, take 10.
    bounds: as in ``scale_by_ngs``.
    per_leaf: as in ``scale_by_ngs``.
    schedule: as in ``scale_by_ngs``. One that is inside of ``inner`` is in part
      undone: the factor makes up for it.

  Extra args of ``update``:
    Forwarded to ``inner``.

  Shapes:
    Any tree to the same tree, types kept. Beside the inner state it holds
    scalars and the last direction in the parameters' type: of a leaf of at least
    65,536 entries only the part that the next step looks at, an eighth or less,
    if one of its axes can be split so.

  Returns:
    An ``optax.GradientTransformationExtraArgs``. Read the factor with
    ``optax.tree.get(state, "acceleration")``.

  Guarantees:
    * ``hyper_rate=0`` equals ``inner``, times the acceleration.
    * The factor is positive, finite and within bounds for any gradients.
    * A non-finite gradient gives zeros and changes only a counter.

  Raises:
    ValueError: for arguments out of range, and for gradients that differ from
      device to device under ``jax.shard_map``.
    TypeError: for parameters that hold integers, Python numbers or functions, for
      the state of another step, and for an ``inner`` whose state changes its
      structure, shapes or types.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_ranger as ranger
    >>> tx = ranger.accelerate(
    ...     optax.sgd(0.5), acceleration=1.0, hyper_rate=0.1, hurry=1.0)
    >>> params = jnp.array(1.0)
    >>> state = tx.init(params)
    >>> update, state = tx.update(jnp.array(2.0), state, params)
    >>> print(update)  # no last direction yet: the factor stays at 1
    -1.0
    >>> update, state = tx.update(jnp.array(2.0), state, params)
    >>> print(f"{update:.4f}")  # cosine 1: -exp(0.1)
    -1.1052

  References:
    Baydin et al., Online Learning Rate Adaptation with Hypergradient Descent,
    2018, https://arxiv.org/abs/1703.04782, equation 6 (any update rule).
  """
  hyper = _factor.Hyper(
    acceleration, hyper_rate, bounds, shrink, hurry, per_leaf, schedule
  )
  hyper.check()
  inner = optax.with_extra_args_support(inner)

  def init(params: PyTree) -> AccelerateState:
    validate.parameters(params, "accelerate")
    return AccelerateState(
      count=numerics.zero_count(),
      num_skipped=numerics.zero_count(),
      factor=hyper.init(params),
      direction_norm=hyper.spread(jnp.zeros([], jnp.float32), params),
      direction=jax.tree.map(parts.zeros, params),
      inner_state=inner.init(params),
    )

  def update(
    updates: PyTree,
    state: AccelerateState,
    params: PyTree = None,
    **extra_args: Any,
  ) -> tuple[PyTree, AccelerateState]:
    validate.state(state, AccelerateState, "accelerate")
    validate.arrays("updates", updates, "accelerate")
    validate.same_tree(
      "updates", parts.kept_shapes(updates), state.direction, "accelerate"
    )
    validate.reduced("updates", updates, state.direction, "accelerate")
    products = _products(hyper, updates, state.direction, state.count)
    # A last direction that overflowed says nothing.
    uphill = jax.tree.map(
      lambda a, d: jnp.where(d > 0, -a, jnp.zeros_like(a)),
      products.agreement,
      state.direction_norm,
    )
    products = _factor.Products(uphill, products.gradient_norm, state.direction_norm)
    good = jnp.logical_and(_factor.all_finite(products), parts.all_finite(updates))
    factor = hyper.advance(state.factor, products, good, state.count)
    nodes, inner_state = replay.guarded(
      lambda old: inner.update(updates, old, params, **extra_args),
      state.inner_state,
      good,
    )
    following = numerics.increment(state.count)
    keep = lambda g, node, old: parts.keep(node.part, g, old, following, good)
    leaves, structure = jax.tree.flatten(updates)
    rows = (structure.flatten_up_to(tree) for tree in (nodes, state.direction))
    kept = [keep(*row) for row in zip(leaves, *rows, strict=True)]
    direction_norm = hyper.total([norm for _, norm in kept], updates)
    # The parameters change after all that reads them, or XLA copies them.
    fits = jnp.logical_and(good, _factor.all_finite(direction_norm))

    def scaled(factor: Array, leaf: Array, node: replay.Node) -> Array:
      direction = node.value.astype(numerics.wide(node.value.dtype))
      return numerics.scaled(factor, direction, leaf.dtype, fits)

    results = jax.tree.map(
      scaled, hyper.multiples(factor, updates, state.count), updates, nodes
    )
    return like_tree(results, updates), AccelerateState(
      count=numerics.increment(state.count, fits),
      num_skipped=numerics.increment(state.num_skipped, jnp.logical_not(fits)),
      factor=factor,
      direction_norm=jax.tree.map(
        lambda new: jnp.where(jnp.isfinite(new), new, jnp.zeros_like(new)),
        direction_norm,
      ),
      direction=structure.unflatten([part for part, _ in kept]),
      inner_state=inner_state,
    )

  return transformation(init, update)


def _products(
  hyper: _factor.Hyper, tree: PyTree, other: PyTree, count: Array
) -> _factor.Products:
  """The products of a gradient and a direction, of all or of each leaf."""
  leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
  found = [parts.products(*pair, count) for pair in zip(leaves, others, strict=True)]
  columns = zip(*found, strict=True) if found else ([], [], [])
  return _factor.Products(*(hyper.total(list(column), tree) for column in columns))
