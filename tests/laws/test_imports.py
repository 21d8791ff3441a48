"""The law of imports: rooms import downward only, and steps never each other."""

import ast
import functools
import graphlib
import pathlib
import shutil
import subprocess
import sys

import pytest

import optax_ranger as ranger

PACKAGE = pathlib.Path(ranger.__file__).parent

# What each room may import besides itself: rooms, or single files of them.
MAY_IMPORT = {
  "_core": set(),
  "_gradients": {"_core"},
  "neighbors": {"_core"},
  "regions": {"_core"},
  "labels": {"_core", "neighbors"},
  "steps": {"_core", "_gradients.linear", "neighbors"},
  "recipes": {"_core", "labels", "steps"},
  "training": {"_core", "_gradients", "neighbors", "regions", "labels", "steps"},
  "graph": {"_core", "neighbors", "labels"},
  "layers": {"_core", "regions"},
  "testing": {"_core"},
  "": {
    *("_core", "_gradients", "neighbors", "regions", "labels", "steps"),
    *("recipes", "training", "graph"),
  },
}
# Of the steps' files, those that are no step: a step may import them.
PARTS = {"steps._factor", "steps._noise_scale"}
# What a room may take from outside as soon as it is imported.
OUTSIDE = {"jax", "numpy", "optax"}
MORE_OUTSIDE = {"layers": {"flax"}}
STANDARD = sys.stdlib_module_names


_parsed = functools.cache(ast.parse)  # Copies differ in one file.


def imported(path, package):
  """The modules that a file imports, and whether on import: (name, bool) pairs."""
  tree = _parsed(path.read_text())
  at_once = {id(node) for node in tree.body}
  at_once |= {
    id(inner) for node in tree.body if isinstance(node, ast.Try) for inner in node.body
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path} imports by a relative path"
      full = [f"{node.module}.{alias.name}" for alias in node.names]
      names = [name if _is_module(name, package) else node.module for name in full]
    else:
      continue
    yield from ((name, id(node) in at_once) for name in names)


def _is_module(name, package):
  place = package.parent.joinpath(*name.split("."))
  return place.is_dir() or place.with_suffix(".py").exists()


def violations(package):
  """What breaks the law in a copy of the package, as sentences."""
  found = []
  files = {}
  for path in sorted(package.rglob("*.py")):
    parts = path.relative_to(package).with_suffix("").parts
    room = parts[0] if len(parts) > 1 else ""
    me = ".".join(part for part in parts if part != "__init__")
    if room not in MAY_IMPORT:
      found.append(f"{me} lies in a room that the law does not know")
      continue
    files[me] = set()
    for name, at_once in imported(path, package):
      first, _, rest = name.partition(".")
      if first == package.name:
        files[me].add(rest)
        other = rest.split(".")[0]
        allowed = {room, *MAY_IMPORT[room]}
        if other not in allowed and not any(
          rest == each or rest.startswith(each + ".") for each in allowed if each
        ):
          found.append(f"{me} imports {rest}")
        if room == other == "steps" and me != "steps" and rest not in PARTS:
          found.append(f"{me} imports another step, {rest}")
      elif "_src" in name or name.startswith("flax.core"):
        found.append(f"{me} imports {name}, which is private")
      elif at_once and first not in STANDARD | OUTSIDE | MORE_OUTSIDE.get(room, set()):
        found.append(f"{me} imports {name} as soon as it is imported")
  try:
    graphlib.TopologicalSorter(files).prepare()
  except graphlib.CycleError as error:
    found.append(f"cycle: {' '.join(error.args[1])}")
  return found


def test_rooms_import_downward_only():
  assert violations(PACKAGE) == []


def test_rooms_have_no_cycle():
  rooms = {
    room: {other.split(".")[0] for other in others}
    for room, others in MAY_IMPORT.items()
  }
  # steps may use one file of the engine, which uses no step.
  order = list(graphlib.TopologicalSorter(rooms).static_order())
  assert order[0] == "_core"
  assert order.index("steps") < order.index("recipes")


PLANTED = {
  "_core/tree.py": ("import optax_ranger.neighbors", "_core.tree imports neighbors"),
  "_gradients/fusion.py": (
    "from optax_ranger.steps import accumulate",
    "_gradients.fusion imports steps",
  ),
  "neighbors/_weights.py": (
    "def late():\n  from optax_ranger.labels import _targets",
    "neighbors._weights imports labels._targets",
  ),
  "steps/_ema.py": (
    "from optax_ranger.steps import _lookahead",
    "steps._ema imports another step, steps._lookahead",
  ),
  "steps/_robust.py": (
    "from optax_ranger._gradients import fusion",
    "steps._robust imports _gradients.fusion",
  ),
  "recipes/_ranger.py": (
    "from optax_ranger.training import train_step",
    "recipes._ranger imports training",
  ),
  "layers/_regional.py": (
    "import optax_ranger.graph",
    "layers._regional imports graph",
  ),
  "graph/_build.py": ("import faiss", "graph._build imports faiss as soon as"),
  "_core/members.py": (
    "from jax._src import core",
    "imports jax._src, which is private",
  ),
  "_core/types.py": ("from optax_ranger._core import tree", "cycle: "),
  "_more/new.py": ("", "_more.new lies in a room that the law does not know"),
}


@pytest.mark.parametrize("file", PLANTED)
def test_planted_import_is_caught(file, tmp_path):
  copy = tmp_path / PACKAGE.name
  shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
  line, expected = PLANTED[file]
  path = copy / file
  path.parent.mkdir(exist_ok=True)
  text = path.read_text() if path.exists() else ""
  path.write_text(text + "\n" + line + "\n")
  assert any(expected in sentence for sentence in violations(copy))


def test_layers_and_testing_are_imported_on_first_use():
  code = """
import sys
import optax_ranger as ranger
assert not {"flax", "optax_ranger.layers", "optax_ranger.testing"} & set(sys.modules)
assert callable(ranger.testing.check)
try:
  ranger.layer
except AttributeError as error:
  assert "has no attribute 'layer'" in str(error)
else:
  raise AssertionError
"""
  subprocess.run([sys.executable, "-c", code], check=True)
  pytest.importorskip("flax")
  assert ranger.layers.RegionalAggregator
