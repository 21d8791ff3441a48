"""Functions of blocks of rows give what they give of all rows."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from optax_ranger._core import blocks


def _places(shared, block):
  """Each row, and a number that no other row has."""
  rows, ids = block
  return shared * rows, ids.astype(jnp.float32)


def _sum(shared, total, block):
  rows, _ = block
  return total + shared * rows.sum(axis=0)


def _rows(n):
  rows = np.random.default_rng(0).integers(-9, 9, [n, 3]).astype(np.float32)
  return rows, np.arange(n, dtype=np.int32)


@pytest.mark.parametrize("what", ["", "on a bar"])
@pytest.mark.parametrize("n", [1, 7, 8, 23, 24, 100])
def test_blocks_give_what_all_rows_give(n, what, monkeypatch):
  monkeypatch.setattr(blocks, "_AT_ONCE", 2)
  rows, ids = _rows(n)
  two = jnp.float32(2)
  found = blocks.map_blocks(_places, two, (rows, ids), 8, what)
  np.testing.assert_array_equal(found[0], 2 * rows)
  np.testing.assert_array_equal(found[1], ids)
  total = blocks.fold_blocks(_sum, two, jnp.zeros(3), (rows, ids), 8, what)
  np.testing.assert_array_equal(total, 2 * rows.sum(axis=0))


def test_blocks_of_a_device():
  """Rows differ from device to device; what they share doesn't."""
  rows, ids = _rows(8 * 20)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  mapped = jax.shard_map(
    lambda part: blocks.map_blocks(_places, jnp.float32(2), part, 8),
    mesh=mesh,
    in_specs=PartitionSpec("data"),
    out_specs=PartitionSpec("data"),
    check_vma=True,
  )
  found = jax.jit(mapped)((rows, ids))
  np.testing.assert_array_equal(found[0], 2 * rows)
  np.testing.assert_array_equal(found[1], ids)
