"""What a compiled step sends between devices, read from its program."""

import math
import re
from typing import Any
from typing import NamedTuple

import jax

_KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")
# Axes of a mesh, and those that form a group, whole ('x') or in part ('x':(1)2).
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")


class Collective(NamedTuple):
  """One collective operation of a compiled program.

  Attributes:
    kind: ``"all-reduce"``, ``"all-gather"``, ``"reduce-scatter"``, ...
    num_bytes: of what it makes on one device, or takes if that is more: the
      reduced arrays, or the gathered ones.
    count: how often a call of the program runs it; a loop whose number of rounds
      the compiler does not know counts once.
    conditional: in how many branches it stands that need not be taken; 0 where it
      always runs. An optimizer without an open window stands in one in
      ``train_step``, which is left out when a batch has no usable example.
  """

  kind: str
  num_bytes: int
  count: int
  conditional: int


def collectives(step: Any) -> list[Collective]:
  """Lists what a step sends between devices, the largest first.

  For tests that hold communication fixed, and to see what a change costs. All
  arrays of one operation count as one; XLA merges those that it can.

  Args:
    step: what ``lower`` of a jitted function gives, or that compiled:
      ``jax.jit(f).lower(...)``, ``train_step(...).lower(...)``.

  Returns:
    A list of ``Collective(kind, num_bytes, count, conditional)``.

  Raises:
    TypeError: for anything else.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_ranger as ranger
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> ranger.training.collectives(jax.jit(jnp.sin).lower(jnp.ones(3)))
    []
  """
  if isinstance(step, jax.stages.Lowered):
    step = step.compile()
  if not isinstance(step, jax.stages.Compiled):
    raise TypeError(
      "step must be the result of jax.jit(f).lower(...), compiled or not, got"
      f" {type(step).__name__}."
    )
  computations, entry = _parse(step.as_text() or "")
  found: list[Collective] = []

  def visit(name: str, count: int, conditional: int) -> None:
    for line in computations.get(name, ()):
      operation = _OPERATION.match(line)
      if operation is None:
        continue
      opcode = operation[2]
      kind = opcode.removesuffix("-start")
      if kind in _KINDS:
        size = _num_bytes(operation[1], line, kind, opcode != kind)
        found.append(Collective(kind, size, count, conditional))
        continue
      trips = _TRIPS.search(line)
      rounds = int(trips[1]) if opcode == "while" and trips else 1
      for called in _CALLED.findall(line):
        visit(called, count * rounds, conditional)
      branches = _BRANCHES.search(line)
      for called in re.findall(r"[\w.\-]+", branches[1]) if branches else ():
        visit(called, count, conditional + 1)

  visit(entry, 1, 0)
  return sorted(found, key=lambda one: -one.num_bytes)


def _parse(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of each computation of a program, and the name of the first."""
  computations: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    start = _COMPUTATION.match(line)
    if start:
      lines = computations.setdefault(start[2], [])
      entry = start[2] if start[1] else entry
    else:
      lines.append(line)
  return computations, entry


def _num_bytes(result: str, line: str, kind: str, started: bool) -> int:
  """Bytes of the larger side of a collective operation."""
  shapes = _SHAPE.findall(result)
  if started and kind in ("all-gather", "collective-permute"):
    # An asynchronous start makes (operands, results), and two counters or none.
    if len(shapes) > 2 and shapes[-2:] == 2 * [("u32", "")]:
      shapes = shapes[:-2]
    shapes = shapes[len(shapes) // 2 :]
  total = sum(
    math.prod(int(size) for size in shape.split(",") if size) * _width(dtype)
    for dtype, shape in shapes
  )
  return total * _group_size(line) if kind == "reduce-scatter" else total


def _group_size(line: str) -> int:
  """How many devices take part in a collective operation together."""
  groups, mesh = _GROUPS.search(line), _MESH.search(line)
  if groups:
    return int(groups[2]) if groups[2] else len(groups[1].split(","))
  if mesh is None:
    return 1
  sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
  parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])
  return math.prod(int(part or sizes[axis]) for axis, part in parts)


def _width(dtype: str) -> int:
  """Bytes of a number of HLO's types, such as bf16, pred and f8e4m3fn."""
  bits = re.search(r"\d+", dtype)
  return max(1, int(bits[0]) // 8) if bits else 1
