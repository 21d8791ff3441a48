"""The one place that configures the tests: devices, strictness, shared fixtures."""

import collections
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import re

# The threads of a worker would wait for those of the other, at full speed.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `benchmarks/gpu.sh` runs some of the laws on an accelerator, by this variable.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
  flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
  ]
  # Twice as fast to compile; from 0.11 on, XLA doesn't know the flag.
  if importlib.metadata.version("jaxlib") < "0.11":
    flags.append("--xla_cpu_use_fusion_emitters=false")
  given = os.environ.get("XLA_FLAGS", "").split()
  os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys(given + flags))

import hypothesis
import jax
import pytest

# The same examples on every run: what fails once, fails again.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)


# XLA takes most of the time of a test; what it has compiled is kept for the next run.
jax.config.update(
  "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# JAX makes an MLIR context for each program that it lowers. That takes 3 ms, longer
# than a small program does. Here one serves all that come one after the other.
_contexts = []
with contextlib.suppress(ImportError, AttributeError):
  from jax._src.interpreters import mlir
  from jax._src.lib.mlir import ir

  _make = mlir.make_ir_context

  def _shared_context():
    if ir.Context.current is not None:  # One program is lowered within another.
      return _make()
    if not _contexts:
      _contexts.append(_make())
    return _contexts[0]

  mlir.make_ir_context = _shared_context


# Where extras are not installed, what imports them isn't collected, and a test that
# meets them is skipped.
_EXTRAS = ("equinox", "faiss", "flax", "grain", "matplotlib", "orbax", "pymetis")
_ABSENT = [
  name for name in (*_EXTRAS, "sklearn", "tqdm") if not importlib.util.find_spec(name)
]
_NEED_THEM = ("benchmarks", "examples", r"tests\.processes")
_IMPORTS = re.compile(
  rf"^(?:from|import) (?:{'|'.join((*_ABSENT, *_NEED_THEM))})\b", re.MULTILINE
)


def pytest_report_header():
  return f"extras not installed: {', '.join(_ABSENT)}" if _ABSENT else ()


def pytest_ignore_collect(collection_path):
  if _ABSENT and collection_path.suffix == ".py":
    return bool(_IMPORTS.search(collection_path.read_text())) or None
  return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
  try:
    return (yield)
  except ImportError as error:
    if _ABSENT:
      pytest.skip(str(error))
    raise


# Tracing makes many objects that live for long; looking at them often costs time.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="module", autouse=True)
def _memory():
  """Programs of earlier modules stay, as long as there is room for them."""
  yield
  _contexts.clear()
  _clear_beyond(_ROOM)


@pytest.fixture(autouse=True)
def _memory_of_a_long_module():
  yield
  _clear_beyond(2 * _ROOM)


_ROOM = 0.8 * 2**30  # bytes


def _clear_beyond(room):
  if _resident() > room:
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc keeps it otherwise.
      ctypes.CDLL(None).malloc_trim(0)


def _resident():
  """Bytes that this process holds; none where the system doesn't tell."""
  try:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  except OSError:
    return 2 * _ROOM
  return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.hookimpl(tryfirst=True)  # Before xdist, which reads the groups in its own.
def pytest_collection_modifyitems(items):
  """Tests of one case, or of one module, share a worker, and what JAX has compiled.

  `make test` has each step once, and each value of each parameter once; further forms
  of a step, and further combinations of parameters, are slow.
  """
  forms, seen, count = {}, collections.defaultdict(set), collections.Counter()
  for item in items:
    call = getattr(item, "callspec", None)
    case = call.params.get("case") if call else None
    if case is None:
      item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
    if call is None:
      continue
    if case is not None:
      item.add_marker(pytest.mark.xdist_group(case.name))
      if forms.setdefault(case.factory, case.name) != case.name:
        item.add_marker(pytest.mark.slow)
    elif not item.get_closest_marker("slow"):
      rows = {
        tuple((name, id(call.params[name])) for name in _names(mark))
        for mark in item.iter_markers("parametrize")
      }
      test = item.path, item.originalname
      few = item.get_closest_marker("few")
      if (len(rows) > 1 and rows <= seen[test]) or (few and count[test] >= few.args[0]):
        item.add_marker(pytest.mark.slow)
      else:
        count[test] += 1
      seen[test] |= rows


def _names(mark):
  names = mark.args[0]
  return (
    [name.strip() for name in names.split(",")] if isinstance(names, str) else names
  )
