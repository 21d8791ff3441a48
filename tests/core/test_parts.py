"""Parts of large leaves: every entry has its turn, whatever the devices."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from optax_ranger._core import parts

SHAPES = [(512, 256), (2**17,), (3, 3, 96, 128), (1021, 256), (2**18, 8), (2048, 1024)]


def normal(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def part_of(shape):
  """Compiled once for all tests of a shape."""
  return jax.jit(parts.view(jax.ShapeDtypeStruct(shape, np.float32)).part)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_entry_has_its_turn_once(shape):
  leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  seen, part = parts.view(leaf), part_of(shape)
  found = [np.asarray(part(leaf, np.int32(i))).ravel() for i in range(seen.count)]
  assert len({len(part) for part in found}) == 1
  np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(leaf.size))


@pytest.mark.parametrize("shape", [(255, 255), (3, 100_003), (), (0, 2**20)])
def test_small_leaves_and_odd_shapes_are_looked_at_as_a_whole(shape):
  leaf = jnp.zeros(shape)
  assert parts.view(leaf) is None
  assert parts.zeros(leaf).shape == shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_part(shape, dtype):
  leaf, other = (jnp.asarray(normal(shape, seed).astype(dtype)) for seed in (0, 1))
  seen = parts.view(leaf)

  @jax.jit
  def all_of(leaf, other, count):
    part, kept = (seen.part(x, count % seen.count) for x in (leaf, other))
    products = [parts.products(leaf, second, count) for second in (other, kept)]
    return part, kept, products

  for count in (0, 3, seen.count + 3):
    part, kept, products = all_of(leaf, other, np.int32(count))
    a, b = (np.asarray(x, np.complex128) for x in (part, kept))
    expected = [np.vdot(*pair).real for pair in ((a, b), (a, a), (b, b))]
    for found in map(np.array, products):
      np.testing.assert_allclose(
        found / seen.count, expected, rtol=1e-4, atol=1e-6 * expected[1]
      )


@pytest.mark.parametrize("shape", [*SHAPES, (3, 5), (0, 4)])
def test_the_mean_is_that_of_the_part(shape):
  leaf = normal(shape)
  seen, count = parts.view(leaf), jnp.int32(3)
  part = leaf if seen is None else part_of(shape)(leaf, np.int32(3 % seen.count))
  found = jax.jit(lambda x: parts.mean(lambda take: take(x) > 0, x, count))(leaf)
  expected = (np.asarray(part) > 0).mean() if leaf.size else 0
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_kept_is_the_part_of_the_next_step(shape):
  leaf = normal(shape)
  leaf[(0,) * len(shape)] = np.inf
  seen, old = parts.view(leaf), np.asarray(parts.zeros(leaf))

  def keep(leaf, old, count, good):
    return parts.keep(lambda take: 2 * take(leaf), leaf, old, count, good)

  keep, part = jax.jit(keep), part_of(shape)
  for count in (0, 1, 9):
    expected = 2 * np.asarray(part(leaf, np.int32(count % seen.count)))
    new, norm = keep(leaf, old, np.int32(count), np.bool(True))
    np.testing.assert_array_equal(new, np.where(np.isfinite(expected), expected, 0))
    total = seen.count * np.sum(expected.astype(np.float64) ** 2)
    np.testing.assert_allclose(norm, total, rtol=1e-4)
    new, _ = keep(leaf, old + 1, np.int32(count), np.bool(False))
    np.testing.assert_array_equal(new, np.ones_like(new))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("data", None), (None, "data")])
def test_devices_look_at_the_same_entries_and_gather_nothing(kind, spec):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  leaf, other = normal((512, 512)), normal((512, 512), 1)
  seen = parts.view(leaf)
  split = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  for count in (0, 5):
    expected = parts.products(leaf, other, jnp.int32(count))
    args = split(leaf), split(other), jnp.int32(count)
    compiled = jax.jit(parts.products).lower(*args).compile()
    np.testing.assert_allclose(compiled(*args), expected, rtol=1e-4)
    assert "all-gather" not in compiled.as_text()
    part = seen.part(split(leaf), jnp.int32(count))
    np.testing.assert_array_equal(part, seen.part(leaf, jnp.int32(count)))


def test_a_leaf_whose_parts_devices_would_have_to_exchange_is_gathered():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
  leaf = normal((32, 4096))
  seen = parts.view(leaf)
  assert seen.outer % 8
  split = jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("data")))
  np.testing.assert_array_equal(seen.part(split, 3), seen.part(leaf, 3))
