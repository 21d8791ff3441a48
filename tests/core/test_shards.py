"""Rows of a batch that is split over devices."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from optax_ranger._core import shards

DTYPES = ("float32", "int32", "uint32", "bool", "uint8", "bfloat16", "float16")


@pytest.mark.parametrize("typed", [True, False])
def test_rows_of_all_types_are_gathered(typed):
  """In the order of the devices, in one collective or several."""
  rng = np.random.default_rng(0)
  shapes = [(), (3,), (2, 1), (1, 2), (2,), (3,), ()]
  rows = {
    dtype: rng.integers(0, 2, [8, *shape]).astype(jnp.dtype(dtype))
    for dtype, shape in zip(DTYPES, shapes, strict=True)
  }
  rows["float32"][:] = rng.standard_normal(8)
  mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
  gather = functools.partial(shards.gather_rows, axis_name="data")
  mapped = jax.shard_map(
    gather,
    mesh=mesh,
    in_specs=PartitionSpec("data"),
    out_specs=PartitionSpec(),
    check_vma=typed,
  )
  found = jax.jit(mapped)(rows)
  for dtype, leaf in rows.items():
    assert found[dtype].dtype == leaf.dtype
    np.testing.assert_array_equal(found[dtype], leaf)
