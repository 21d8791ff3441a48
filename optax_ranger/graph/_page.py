"""What an audit has found, as one web page without scripts."""

import base64
import html
import struct
from typing import Any
from typing import NamedTuple
import zlib

import numpy as np

from optax_ranger._core.types import Neighbors
from optax_ranger.graph._audit import Audit

_MOST_CLASSES, _MOST_ROWS, _MOST_PAIRS = 20, 60, 30
# Of the median distance to the nearest neighbor: how close near-duplicates are.
_NEAR = 0.05
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto;
  padding: 1rem; overflow-wrap: anywhere; background: Canvas; color: CanvasText; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
td, th { border: 1px solid #888; padding: .2rem .5rem; text-align: right; }
th { font-weight: 600; }
.off { background: #8884; }
figure { display: inline-block; margin: .3rem; width: 8rem; vertical-align: top;
  font-size: 13px; text-align: center; }
img { width: 6rem; image-rendering: pixelated; border: 1px solid #888; }
"""


class Findings(NamedTuple):
  """What the page and the table show.

  Attributes:
    found: the audit.
    names: the class of each example as it was given, a name or "".
    suspicious: the rows that are likely wrong, worst first.
    pairs: ``[m, 2]``, rows that are nearly equal, those with different labels first.
    images: ``uint8 [n, H, W]`` or ``[n, H, W, 3]``, or None.
  """

  found: Audit
  names: list[str]
  suspicious: np.ndarray
  pairs: np.ndarray
  images: np.ndarray | None


def findings(
  found: Audit, labels: np.ndarray, neighbors: Neighbors, images: Any = None
) -> Findings:
  """Collects what an audit and a graph say of the labels."""
  names = ["" if label is None else str(label) for label in labels.tolist()]
  known = int(np.isfinite(found.margin).sum())
  wrong = min(known, round(float(np.nan_to_num(found.num_wrong))))
  pairs = near_duplicates(neighbors, names)
  return Findings(found, names, found.order[:wrong], pairs, _as_bytes(images))


def near_duplicates(neighbors: Neighbors, names: list[str]) -> np.ndarray:
  """Pairs of rows that are much closer than neighbors usually are, ``[m, 2]``.

  Pairs with different labels come first, then the closest.
  """
  distances = np.asarray(neighbors.distances)
  indices = np.asarray(neighbors.indices)
  nearest = distances[:, 0]
  some = nearest[np.isfinite(nearest)]
  if not some.size:
    return np.zeros([0, 2], np.int64)
  limit = _NEAR * np.median(some)
  row, place = np.nonzero((distances <= limit) & (indices >= 0))
  other = indices[row, place]
  pairs = np.sort(np.stack([row, other], axis=1), axis=1)
  pairs, first = np.unique(pairs, axis=0, return_index=True)
  far = distances[row, place][first]
  same = np.array([names[a] == names[b] for a, b in pairs], bool)
  return pairs[np.lexsort((far, same))]


def suggested_name(result: Findings, i: int) -> str:
  """The class that the audit suggests for an example."""
  return _name(result.found, int(result.found.suggested[i]))


def _name(found: Audit, label: int) -> str:
  if label < 0:
    return ""
  return str(label if found.classes is None else found.classes[label])


def render(result: Findings, title: str, notes: list[str]) -> str:
  """The page, as HTML that needs no other file."""
  parts = [f"<h1>{html.escape(title)}</h1>"]
  parts += [f"<p>{html.escape(note)}</p>" for note in notes]
  parts += ["<h2>Which classes are confused</h2>", _confusion(result)]
  parts += ["<h2>The most suspicious labels</h2>", _worst(result)]
  if result.images is not None:
    parts.append(_pictures(result, result.images))
  parts += ["<h2>Near-duplicates</h2>", _near(result)]
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
    f"<body><article>{''.join(parts)}</article></body></html>\n"
  )


def _table(head: list[str], rows: list[list[Any]], shaded: Any = ()) -> str:
  cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
  lines = [f"<tr>{cells}</tr>"]
  for i, row in enumerate(rows):
    marks = [' class="off"' if (i, j) in shaded else "" for j in range(len(row))]
    cells = zip(marks, row, strict=True)
    line = "".join(f"<td{mark}>{html.escape(str(cell))}</td>" for mark, cell in cells)
    lines.append(f"<tr>{line}</tr>")
  return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _confusion(result: Findings) -> str:
  """Given and suggested classes of the labels that are likely wrong."""
  pairs: dict[tuple[str, str], int] = {}
  for i in result.suspicious:
    pair = result.names[i], suggested_name(result, i)
    pairs[pair] = pairs.get(pair, 0) + 1
  if not pairs:
    return "<p>No label is likely wrong.</p>"
  classes = sorted(set(result.names) - {""}, key=_natural)
  text = (
    "<p>Of the labels that are likely wrong: given (rows), suggested (columns).</p>"
  )
  if len(classes) <= _MOST_CLASSES:
    rows = [[a, *(pairs.get((a, b), "") for b in classes)] for a in classes]
    shaded = {(i, i + 1) for i in range(len(classes))}
    return text + _table(["", *classes], rows, shaded)
  worst = sorted(pairs.items(), key=lambda item: -item[1])[:_MOST_PAIRS]
  return _table(["given", "suggested", "labels"], [[*pair, n] for pair, n in worst])


def _natural(name: str) -> tuple[int, int, str]:
  """Numbers in their order, before names."""
  return (0, int(name), "") if name.lstrip("-").isdecimal() else (1, 0, name)


def _worst(result: Findings) -> str:
  rows = [
    [i, result.names[i], suggested_name(result, i), f"{result.found.support[i]:.2f}"]
    for i in result.found.order[:_MOST_ROWS]
    if np.isfinite(result.found.support[i])
  ]
  return _table(["row", "given", "suggested", "support"], rows)


def _pictures(result: Findings, images: np.ndarray) -> str:
  figures = []
  for i in result.found.order[:_MOST_ROWS]:
    data = base64.b64encode(png(images[i])).decode()
    text = html.escape(f"{i}: {result.names[i]} → {suggested_name(result, i)}")
    figures.append(
      f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
      f"<figcaption>{text}</figcaption></figure>"
    )
  return f"<div>{''.join(figures)}</div>"


def _near(result: Findings) -> str:
  if not len(result.pairs):
    return "<p>There are none.</p>"
  differ = sum(result.names[a] != result.names[b] for a, b in result.pairs)
  text = (
    f"<p>{len(result.pairs)} pairs of rows are nearly equal; {differ} of them have"
    " different labels. These come first.</p>"
  )
  rows = [[a, b, result.names[a], result.names[b]] for a, b in result.pairs]
  head = ["row", "other row", "label", "other label"]
  return text + _table(head, rows[:_MOST_PAIRS])


def _as_bytes(images: Any) -> np.ndarray | None:
  """Images in grays or colors of one byte."""
  if images is None:
    return None
  images = np.asarray(images)
  if images.dtype != np.uint8:
    low, high = np.nanmin(images), np.nanmax(images)
    scale = 255 / max(float(high - low), np.finfo(np.float64).tiny)
    images = np.nan_to_num((images - low) * scale).clip(0, 255).astype(np.uint8)
  return images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images


def png(image: np.ndarray) -> bytes:
  """An image ``uint8 [H, W]`` or ``[H, W, 3]`` in the format PNG."""
  height, width = image.shape[:2]
  rows = np.zeros(
    [height, 1 + image[0].size], np.uint8
  )  # A row starts with its filter.
  rows[:, 1:] = image.reshape(height, -1)

  def chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check

  color = 2 if image.ndim == 3 else 0
  header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
  body = zlib.compress(rows.tobytes())
  parts = (chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b""))
  return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
