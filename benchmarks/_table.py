"""Figures as records of a CSV file, and as a Markdown table."""

from collections.abc import Mapping
from collections.abc import Sequence
import csv
import pathlib

COLUMNS = (
  "what",
  "rival",
  "ratio",
  "ratio_low",
  "ratio_high",
  "reach",
  "milliseconds",
  "rival_milliseconds",
  "temporaries",
  "rival_temporaries",
  "machine",
)
_HEADINGS = (
  "what",
  "rival",
  "ratio (quartiles)",
  "should reach",
  "ms, rival's ms",
  "temporaries, rival's",
)

Record = Mapping[str, str]


def read(path: pathlib.Path) -> list[dict[str, str]]:
  with path.open(newline="") as file:
    return list(csv.DictReader(file))


def write(
  path: pathlib.Path, records: Sequence[Record], columns: Sequence[str] = COLUMNS
) -> None:
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)


def markdown(records: Sequence[Record]) -> str:
  """A table for each machine, below its name."""
  machines = dict.fromkeys(record["machine"] for record in records)
  return "\n\n".join(
    f"{machine}\n\n" + table([one for one in records if one["machine"] == machine])
    for machine in machines
  )


def table(records: Sequence[Record]) -> str:
  """The records without their machines."""
  lines: list[str] = [" | ".join(_HEADINGS), " | ".join("---" for _ in _HEADINGS)]
  for record in records:
    cells = (
      record["what"],
      record["rival"],
      _ratio(record),
      record["reach"],
      _pair(record, "milliseconds", _number),
      _pair(record, "temporaries", _size),
    )
    lines.append(" | ".join(cells))
  return "\n".join(f"| {line} |" for line in lines)


def _ratio(record: Record) -> str:
  middle, low, high = (
    record[key] and _number(record[key]) for key in ("ratio", "ratio_low", "ratio_high")
  )
  if not middle:
    return "not measured"
  return middle if low == middle == high else f"{middle} ({low} to {high})"


def _pair(record, column, form):
  cells = [record[key] and form(record[key]) for key in (column, f"rival_{column}")]
  return ", ".join(cell or "-" for cell in cells) if any(cells) else "-"


def _number(text: str) -> str:
  value = float(text)
  return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def _size(text: str) -> str:
  """Bytes, in a unit in which few of them are left."""
  value = float(text)
  for unit in ("B", "kB"):
    if value < 999.5:
      return f"{value:.3g} {unit}"
    value /= 1000
  return f"{_number(str(value))} MB"
