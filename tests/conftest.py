"""The one place that configures the tests: devices, strictness, shared fixtures."""

import os

# `benchmarks/gpu.sh` runs some of the laws on an accelerator, by this variable.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  )

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)


def pytest_collection_modifyitems(items):
  """Tests of one case share a worker, and with it what JAX has compiled.

  Further forms of a step are slow: `make test` has each step once.
  """
  seen = {}
  for item in items:
    call = getattr(item, "callspec", None)
    case = call and call.params.get("case")
    if case is not None:
      item.add_marker(pytest.mark.xdist_group(case.name))
      if seen.setdefault(case.factory, case.name) != case.name:
        item.add_marker(pytest.mark.slow)
