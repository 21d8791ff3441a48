"""The other Ranger against its reference, in NumPy and in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ranger as ranger

SHAPES = {"bias": (5,), "kernel": (4, 5), "conv": (3, 3, 4, 6), "scale": ()}


def draw(seed):
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def narrow(tree):
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def step_of(tx):
  """Parameters, their slow copies, and the state after a step, in one program."""

  @jax.jit
  def step(gradient, state, params):
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return params, ranger.eval_params(state, params), state

  return step


class Original:
  """The original Ranger (2020) for one array, in float64, axes as in Flax."""

  def __init__(self, param, *, b1=0.95, b2=0.999, eps=1e-5, threshold=5, decay=0.0):
    self.param, self.slow = param.copy(), param.copy()
    self.m, self.v, self.t = np.zeros_like(param), np.zeros_like(param), 0
    self.b1, self.b2, self.eps, self.threshold = b1, b2, eps, threshold
    self.decay = decay

  def step(self, gradient, rate):
    g = gradient
    if g.ndim > 1:
      g = g - g.mean(axis=tuple(range(g.ndim - 1)), keepdims=True)
    self.t += 1
    self.m = self.b1 * self.m + (1 - self.b1) * g
    self.v = self.b2 * self.v + (1 - self.b2) * g * g
    power = self.b2**self.t
    limit = 2 / (1 - self.b2) - 1
    length = limit - 2 * self.t * power / (1 - power)
    self.param = self.param * (1 - self.decay * rate)
    if length > self.threshold:
      ratio = (length - 4) * (length - 2) * limit
      ratio /= (limit - 4) * (limit - 2) * length
      size = np.sqrt((1 - power) * ratio) / (1 - self.b1**self.t)
      self.param = self.param - rate * size * self.m / (np.sqrt(self.v) + self.eps)
    else:
      self.param = self.param - rate * self.m / (1 - self.b1**self.t)
    if self.t % 6 == 0:
      self.slow = self.slow + 0.5 * (self.param - self.slow)
      self.param = self.slow.copy()


@pytest.mark.guarantees(
  "ranger_radam", "Fifty steps equal the original in NumPy and in PyTorch"
)
@pytest.mark.few(1)
@pytest.mark.parametrize("threshold", [4, 5])
@pytest.mark.parametrize("b2", [0.99, 0.999])
def test_fifty_steps_equal_numpy(threshold, b2):
  start = draw(0)
  rates = optax.linear_schedule(0.01, 0.005, 50)
  tx = ranger.ranger_radam(rates, b2=b2, threshold=threshold, weight_decay=0.1)
  original = {
    name: Original(leaf, b2=b2, threshold=threshold, decay=0.1)
    for name, leaf in start.items()
  }
  params, update = narrow(start), step_of(tx)
  state = tx.init(params)
  for step in range(50):
    gradient = draw(1 + step)
    params, slow, state = update(narrow(gradient), state, params)
    for name, one in original.items():
      one.step(gradient[name], 0.01 - 0.005 * step / 50)
      np.testing.assert_allclose(params[name], one.param, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(slow[name], one.slow, rtol=1e-5, atol=1e-6)


@pytest.mark.guarantees(
  "ranger_radam", "Fifty steps equal the original in NumPy and in PyTorch"
)
def test_fifty_steps_equal_pytorch_optimizer():
  """With `degenerated_to_sgd`: without it, the package's first steps go uphill."""
  reason = "the PyTorch package is not installed: pip install torch pytorch_optimizer"
  torch = pytest.importorskip("torch", reason=reason)
  package = pytest.importorskip("pytorch_optimizer", reason=reason)
  start = draw(0)
  theirs = {
    name: torch.nn.Parameter(torch.tensor(_output_first(leaf)))
    for name, leaf in start.items()
  }
  optimizer = package.Ranger(theirs.values(), lr=0.01, degenerated_to_sgd=True)
  tx = ranger.ranger_radam(0.01)
  params, update = narrow(start), step_of(tx)
  state = tx.init(params)
  for step in range(50):
    gradient = draw(1 + step)
    for name, one in theirs.items():
      one.grad = torch.tensor(_output_first(gradient[name]))
    optimizer.step()
    params, _, state = update(narrow(gradient), state, params)
    for name, one in theirs.items():
      np.testing.assert_allclose(
        _output_first(np.asarray(params[name])),
        one.detach().numpy(),
        rtol=1e-5,
        atol=1e-6,
      )


def _output_first(leaf):
  """From Flax's layout to PyTorch's."""
  return np.moveaxis(leaf, -1, 0).copy() if leaf.ndim > 1 else leaf


def first_direction(output_axis, gradient):
  """The first step is the gradient itself, centralized."""
  tx = ranger.ranger_radam(-1.0, output_axis=output_axis)
  updates, _ = jax.jit(tx.update)(gradient, tx.init(gradient), gradient)
  return jax.device_get(updates)


@pytest.mark.guarantees(
  "ranger_radam", "Centralized gradients have a mean of zero over the inputs"
)
def test_centralize_equals_optax():
  gradient = narrow(draw(0))
  expected, _ = jax.jit(optax.centralize().update)(gradient, optax.EmptyState())
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    first_direction(0, gradient),
    expected,
  )


@pytest.mark.guarantees(
  "ranger_radam", "Centralized gradients have a mean of zero over the inputs"
)
def test_centralized_mean_is_zero():
  gradient = narrow(draw(0))
  result = first_direction(-1, gradient)
  for name, axes in {"kernel": 0, "conv": (0, 1, 2)}.items():
    np.testing.assert_allclose(result[name].mean(axis=axes), 0, atol=1e-6)
    assert np.abs(result[name]).max() > 0.1
  for name in ("bias", "scale"):
    np.testing.assert_allclose(result[name], gradient[name], rtol=1e-5)
  untouched = first_direction(None, gradient)
  np.testing.assert_allclose(untouched["kernel"], gradient["kernel"], rtol=1e-5)


@pytest.mark.guarantees("ranger_radam", "Rectification is exact to float32")
@pytest.mark.parametrize("b2", [0.9, 0.99, 0.999, 0.9999])
def test_rectification_loses_no_digits(b2):
  """On constant gradients the direction is the rectification and its biases."""
  tx = ranger.ranger_radam(-1.0, b2=b2, eps=1e-30, threshold=4.0, step_size=1.0)
  params = jnp.zeros([])

  def body(state, _):
    updates, state = tx.update(jnp.ones([]), state, params)
    return state, updates

  _, results = jax.lax.scan(body, tx.init(params), length=20000)
  t = np.arange(1, 20001, dtype=np.float64)
  limit = 2 / (1 - b2) - 1
  length = limit - 2 * t * b2**t / (1 - b2**t)
  rectify = length > 4
  ratio = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
  expected = np.where(rectify, np.sqrt(np.where(rectify, ratio, 1)), 1)
  np.testing.assert_allclose(results, expected, rtol=2e-5)


def test_a_small_decay_never_rectifies():
  tx = ranger.ranger_radam(-1.0, b2=0.5, threshold=4.0, step_size=1.0)
  params = jnp.zeros([])
  state, update = tx.init(params), jax.jit(tx.update)
  for _ in range(10):
    updates, state = update(np.float32(3), state, params)
    np.testing.assert_allclose(updates, 3, rtol=1e-5)


@pytest.mark.guarantees("skip_nonfinite", "Finite updates are those of inner")
def test_finite_updates_are_the_inner_ones():
  inner = optax.sgd(0.1, momentum=0.9)
  step = ranger.skip_nonfinite(inner)
  some = lambda seed: {name: narrow(draw(seed))[name] for name in ("kernel", "scale")}
  params = some(0)
  state, expected_state = step.init(params), inner.init(params)
  for seed in range(4):
    gradient = some(seed)
    updates, state = step.update(gradient, state, params)
    expected, expected_state = inner.update(gradient, expected_state, params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
  assert int(state.num_skipped) == 0


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_bad_gradient_at_a_synchronization_changes_nothing(dtype):
  """On the sixth step the parameters would go back to the slow copy."""
  tx = ranger.ranger_radam(0.1, every=3)
  params = jnp.arange(4, dtype=dtype)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for call in range(1, 7):
    updates, after = update(jnp.full([4], jnp.nan, dtype), state, params)
    assert not np.asarray(updates).any()
    assert int(after.num_skipped) == 1
    assert int(after.lookahead.count) == int(state.lookahead.count)
    # The slow copy of a window that begins is that of the parameters.
    begins = int(state.lookahead.count) == 0
    expected = params if begins else state.lookahead.slow
    np.testing.assert_allclose(after.lookahead.slow, expected, rtol=0.01)
    updates, state = update(jnp.sin(params + call), state, params)
    params = optax.apply_updates(params, updates)


def test_squares_that_overflow_are_skipped():
  tx = ranger.ranger_radam(0.1)
  params, update = np.ones([4], np.float32), jax.jit(tx.update)
  updates, state = update(np.float32(1e25) * params, tx.init(params), params)
  assert not np.asarray(updates).any()
  assert int(state.num_skipped) == 1
  updates, _ = update(params, state, params)
  np.testing.assert_allclose(updates, -0.1, rtol=1e-5)


STACKS = {
  "bias": (1, (2, 4)),
  "kernel": (1, (2, 4, 5)),
  "conv": (1, (2, 3, 3, 4, 6)),
  "scale": (1, (2,)),
  "twice": (2, (2, 3, 4, 5)),
  "alone": (0, (4, 5)),
}


@pytest.mark.guarantees(
  "ranger_radam", "Stacked layers are updated like separate layers"
)
@pytest.mark.few(2)
@pytest.mark.parametrize("output_axis", [-1, 0, None])
@pytest.mark.parametrize("form", ["tree", "function", "number"])
def test_stacked_layers_are_centralized_apart(form, output_axis):
  """Ten steps of stacked leaves are those of each layer by itself."""
  depths = {name: depth for name, (depth, _) in STACKS.items()}
  shapes = {name: shape for name, (_, shape) in STACKS.items()}
  given = {"tree": depths, "function": lambda updates: depths, "number": 1}[form]
  if form == "number":
    shapes = {name: shapes[name] for name in shapes if depths[name] == 1}
  rng = np.random.default_rng(0)
  draw = lambda: {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
  apart = lambda tree: {
    name: list(leaf.reshape(-1, *leaf.shape[depths[name] :]))
    for name, leaf in tree.items()
  }
  params, options = draw(), {"threshold": 4.0, "b2": 0.9, "output_axis": output_axis}
  stacked = ranger.ranger_radam(0.1, stack_axes=given, **options)
  single = ranger.ranger_radam(0.1, **options)
  state, layers = stacked.init(params), single.init(apart(params))
  update, update_layers = jax.jit(stacked.update), jax.jit(single.update)
  for _ in range(10):
    gradient = draw()
    updates, state = update(gradient, state, params)
    updates = jax.device_get(updates)
    expected, layers = update_layers(apart(gradient), layers, apart(params))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      apart(updates),
      expected,
    )


def test_a_stacked_bias_passes():
  step = ranger.ranger_radam(0.1, stack_axes=1)
  params = {"bias": jnp.zeros((3, 4))}
  gradient = {"bias": jnp.ones((3, 4))}
  updates, _ = jax.jit(step.update)(gradient, step.init(params), params)
  np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-5)


def test_stack_axes_may_begin_like_the_parameters():
  """And may be masked: a node without leaves has no axes."""
  depths = {"blocks": 1, "embed": 0}
  zeros = lambda *shape: np.zeros(shape, np.float32)
  params = {"blocks": {"a": zeros(3, 4), "b": zeros(3, 2)}, "embed": zeros(3, 4)}
  step = ranger.ranger_radam(0.1, stack_axes=depths)
  ones = jax.tree.map(np.ones_like, params)
  updates, _ = jax.jit(step.update)(ones, step.init(params), params)
  np.testing.assert_allclose(updates["blocks"]["a"], -0.1, rtol=1e-5)
  np.testing.assert_allclose(updates["embed"], 0, atol=1e-7)
  masked = optax.masked(step, {"blocks": False, "embed": True})
  updates, _ = jax.jit(masked.update)(ones, masked.init(params), params)
  np.testing.assert_array_equal(updates["blocks"]["b"], 1)
  np.testing.assert_allclose(updates["embed"], 0, atol=1e-7)


@pytest.mark.parametrize("b2", [0.9, 0.999])
def test_float64_keeps_its_digits(b2):
  """As far as the reference does, which subtracts numbers of 2 / (1 - b2)."""
  start = draw(0)
  original = {name: Original(leaf, b2=b2) for name, leaf in start.items()}
  with jax.enable_x64(True):
    tx = ranger.ranger_radam(0.01, b2=b2)
    params = jax.tree.map(jnp.asarray, start)
    state, update = tx.init(params), step_of(tx)
    for step in range(20):
      gradient = draw(1 + step)
      params, _, state = update(gradient, state, params)
      for name, one in original.items():
        one.step(gradient[name], 0.01)
        np.testing.assert_allclose(params[name], one.param, rtol=1e-11, atol=1e-12)
