"""The command line: good files give a table and a page, bad ones one sentence."""

import base64
import csv
import html.parser
import subprocess
import sys
import types

import numpy as np
import pytest
from sklearn import datasets

import optax_ranger as ranger
from optax_ranger import __main__ as command
from optax_ranger import graph
from optax_ranger.graph import _page
from optax_ranger.graph import _tables

N = 40


def points(n=N):
  rng = np.random.default_rng(0)
  return (10 * (np.arange(n)[:, None] % 2) + rng.normal(size=[n, 3])).astype(np.float32)


LABELS = [str(i % 2) for i in range(N)]


def write(path, content):
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif isinstance(content, str):
    path.write_text(content)
  elif isinstance(content, dict):
    np.savez(path, **content)
  else:
    np.save(path, content, allow_pickle=True)
  return path


def run(folder, features, labels, *options):
  """The exit status, for files of these names and contents."""
  paths = []
  for name, content in (features, labels):
    paths.append(folder / name if content is None else write(folder / name, content))
  arguments = ["audit", *map(str, paths), "--out", str(folder / "out"), "--k", "5"]
  arguments += ["--score", "votes"]
  return command.main([*arguments, *options])


def lines(rows, delimiter=","):
  return "\n".join(delimiter.join(map(str, row)) for row in rows) + "\n"


FEATURES = ("x.npy", points())
GOOD_LABELS = ("y.csv", lines([[label] for label in LABELS]))
NUMPY = points().astype(np.float64)


def npy(array):
  """A file of NumPy, as bytes."""
  import io

  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


BAD_FEATURES = {
  "no such file": ("x.npy", None),
  "no suffix": ("x", b"1,2\n"),
  "another suffix": ("x.xlsx", b"PK"),
  "empty": ("x.npy", b""),
  "empty csv": ("x.csv", ""),
  "blank csv": ("x.csv", "\n \n\n"),
  "cut off": ("x.npy", npy(points())[:200]),
  "cut off in the header": ("x.npy", npy(points())[:40]),
  "not NumPy": ("x.npy", b"hello, this is not an array"),
  "pickled": ("x.npy", np.array([{"a": 1}, None], object)),
  "huge by its header": (
    "x.npy",
    npy(points()).replace(b"(40, 3), }", b"(40, 3000000000000), }", 1),
  ),
  "one dimension": ("x.npy", np.arange(40.0)),
  "no dimension": ("x.npy", np.float32(3)),
  "one row": ("x.npy", points(1)),
  "no rows": ("x.npy", points(0)),
  "no columns": ("x.npy", np.zeros([40, 0])),
  "complex": ("x.npy", points() * 1j),
  "text": ("x.npy", np.array([["a", "b"]] * N)),
  "dates": ("x.npy", np.zeros([N, 2], "datetime64[s]")),
  "records": ("x.npy", np.zeros([N], [("a", float), ("b", float)])),
  "npz of two": ("x.npz", {"a": points(), "b": points()}),
  "npz of none": ("x.npz", {}),
  "npz that is no zip": ("x.npz", b"PK\x03\x04 broken"),
  "npz pickled": ("x.npz", {"x": np.array([None, 1], object)}),
  "header only": ("x.csv", "a,b,c\n"),
  "words": ("x.csv", "a,b\n1,2\n3,four\n"),
  "ragged": ("x.csv", "1,2\n3\n"),
  "longer row": ("x.csv", "1,2\n3,4,5\n"),
  "empty cell": ("x.csv", "1,2\n3,\n"),
  "binary csv": ("x.csv", b"1,2\n\x00\x00"),
  "latin-1": ("x.csv", "1,2\ncaf\xe9,3\n".encode("latin-1")),
  "quotes": ("x.csv", '1,2\n"3,4\n'),
  "too few for k": ("x.npy", points(4)),
  "tsv with commas": ("x.tsv", "1,2\n3,4\n"),
}
BAD_LABELS = {
  "no such file": ("y.csv", None),
  "another suffix": ("y.json", "[1]"),
  "empty": ("y.txt", ""),
  "too short": ("y.txt", "1\n" * (N - 1)),
  "too long": ("y.txt", "1\n" * (N + 2)),
  "two columns": ("y.csv", lines([["a", "b"], *([1, 2] for _ in LABELS)])),
  "twice the same name": ("y.csv", lines([["label"] * 2, *([1, 2] for _ in LABELS)])),
  "ragged": ("y.csv", lines([["id", "label"], [1, 2], [3]])),
  "open quote": ("y.csv", '"1\n' + "1\n" * N),
  "binary": ("y.csv", b"\x00\x01\x02"),
  "utf-16": ("y.csv", lines([[1]] * N).encode("utf-16")),
  "matrix": ("y.npy", np.zeros([N, 2], np.int32)),
  "scalar": ("y.npy", np.int32(1)),
  "complex": ("y.npy", np.zeros([N], complex)),
  "fractions": ("y.npy", np.full([N], 0.5)),
  "below -1": ("y.npy", np.full([N], -7)),
  "beyond int32": ("y.npy", np.full([N], 2**40)),
  "pickled": ("y.npy", np.array([1, None] * (N // 2), object)),
  "npz of two": ("y.npz", {"a": np.zeros(N), "b": np.zeros(N)}),
  "parquet that is none": ("y.parquet", b"PAR1 broken"),
  "cut off": ("y.npy", npy(np.zeros(N))[:150]),
}


def test_there_are_fifty():
  assert len(BAD_FEATURES) + len(BAD_LABELS) >= 50


def said(capsys, name):
  """The sentence that was printed."""
  out, err = capsys.readouterr()
  assert not out
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  assert err.endswith(".\n")
  assert len(err) < 300
  assert "Traceback" not in err
  return err


@pytest.mark.parametrize("what", BAD_FEATURES)
def test_a_bad_file_of_features_gets_a_sentence(what, tmp_path, capsys):
  name, content = BAD_FEATURES[what]
  labels = ("y.txt", "1\n0\n" * 2) if what == "too few for k" else GOOD_LABELS
  assert run(tmp_path, (name, content), labels) == 2
  err = said(capsys, name)
  assert ("k must" if what == "too few for k" else name) in err


@pytest.mark.parametrize("what", BAD_LABELS)
def test_a_bad_file_of_labels_gets_a_sentence(what, tmp_path, capsys):
  name, content = BAD_LABELS[what]
  assert run(tmp_path, FEATURES, (name, content)) == 2
  err = said(capsys, name)
  values = ("fractions", "below -1", "beyond int32")
  assert ("labels" if what in values else name) in err


def test_bad_options_get_a_sentence(tmp_path, capsys):
  for options in (["--images", "2x2"], ["--images", "big"], ["--column", "b"]):
    assert run(tmp_path, FEATURES, GOOD_LABELS, *options) == 2
    said(capsys, "")
  (tmp_path / "folder.npy").mkdir()
  assert run(tmp_path, ("folder.npy", None), GOOD_LABELS) == 2
  assert "not a file" in said(capsys, "")


def table(folder):
  with (folder / "out" / "audit.csv").open() as file:
    return list(csv.DictReader(file))


WRONG = 7
GIVEN = [str(1 - i % 2) if i == WRONG else str(i % 2) for i in range(N)]
NAMES = ["cat" if label == "1" else "dog" for label in GIVEN]
GOOD = {
  "npy": (FEATURES, ("y.npy", np.array(GIVEN, np.int64))),
  "one column": (FEATURES, ("y.csv", lines([[x] for x in GIVEN]))),
  "header": (FEATURES, ("y.csv", lines([["label"], *([x] for x in GIVEN)]))),
  "names": (FEATURES, ("y.txt", "\n".join(NAMES))),
  "names of NumPy": (FEATURES, ("y.npy", np.array(NAMES))),
  "a column of three": (
    FEATURES,
    ("y.csv", lines([["id", "label", "z"], *([i, x, 0] for i, x in enumerate(GIVEN))])),
  ),
  "npz": (
    ("x.npz", {"features": points(), "other": points()}),
    ("y.npz", {"a": GIVEN}),
  ),
  "csv": (("x.csv", lines(points())), ("y.tsv", lines([[x] for x in NAMES], "\t"))),
  "csv with a header": (
    ("x.csv", "a,b,c\n" + lines(points())),
    ("y.txt", "\n".join(GIVEN)),
  ),
  "semicolons, byte order mark": (
    ("x.csv", ("\ufeff" + lines(points(), ";")).encode()),
    ("y.csv", lines([["é;", x] for x in GIVEN], ";").replace("é;;", "é;")),
  ),
  "float64": (("x.npy", NUMPY + 1e6), ("y.npy", np.array(GIVEN, np.float64))),
  "images": (("x.npy", points().reshape(N, 1, 3)), ("y.txt", "\n".join(GIVEN))),
  "booleans": (("x.npy", points() > 5), ("y.txt", "\n".join(GIVEN))),
}


@pytest.mark.parametrize("what", GOOD)
def test_a_planted_wrong_label_comes_first(what, tmp_path, capsys):
  features, labels = GOOD[what]
  options = []
  if what.startswith("semi"):
    labels = ("y.csv", "name;label\n" + lines([["é", x] for x in GIVEN], ";"))
    options = ["--column", "label"]
  assert run(tmp_path, features, labels, *options) == 0, capsys.readouterr().err
  (worst, *_), rows = table(tmp_path), table(tmp_path)
  assert len(rows) == N
  if what != "booleans":  # Noise of the features, cut at 5: all are equal.
    assert int(worst["row"]) == WRONG
  assert worst["given"] != worst["suggested"]
  assert worst["likely_wrong"] == "1"
  assert capsys.readouterr().out.splitlines()[0].startswith(f"{N} examples, 2 classes")


def test_parquet(tmp_path, capsys):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  x = points()
  parquet.write_table(
    pyarrow.table({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2]}), tmp_path / "x.parquet"
  )
  parquet.write_table(
    pyarrow.table({"id": range(N), "label": NAMES}), tmp_path / "y.parquet"
  )
  assert run(tmp_path, ("x.parquet", None), ("y.parquet", None)) == 0
  assert table(tmp_path)[0]["row"] == str(WRONG)
  parquet.write_table(pyarrow.table({"rows": [*x]}), tmp_path / "x.parquet")
  assert run(tmp_path, ("x.parquet", None), ("y.parquet", None)) == 0
  assert table(tmp_path)[0]["row"] == str(WRONG)
  parquet.write_table(pyarrow.table({"a": x[:, 0]}), tmp_path / "x.parquet")
  assert run(tmp_path, ("x.parquet", None), ("y.parquet", None)) == 0
  capsys.readouterr()
  parquet.write_table(pyarrow.table({"a": NAMES}), tmp_path / "x.parquet")
  assert run(tmp_path, ("x.parquet", None), ("y.parquet", None)) == 2
  assert "'a' must hold numbers" in capsys.readouterr().err


def test_missing_labels_and_bad_rows(tmp_path, capsys):
  x = points()
  x[3] = np.nan
  given = ["" if i == 0 else label for i, label in enumerate(GIVEN)]
  assert (
    run(tmp_path, ("x.npy", x), ("y.csv", lines([["label"], *([g] for g in given)])))
    == 0
  )
  out = capsys.readouterr().out
  assert out.startswith(f"{N} examples, 2 classes, 5 neighbors.")
  assert "1 examples have non-finite features" in out
  rows = {int(row["row"]): row for row in table(tmp_path)}
  assert rows[0]["given"] == ""
  assert rows[0]["likely_wrong"] == rows[3]["likely_wrong"] == "0"
  assert next(int(row["row"]) for row in table(tmp_path)) == WRONG


class Parsed(html.parser.HTMLParser):
  """Tags that are open, and all text."""

  def __init__(self):
    super().__init__()
    self.open, self.text, self.images, self.tables = [], "", [], []
    self.shaded = []

  def handle_starttag(self, tag, attrs):
    if tag == "img":
      self.images.append((dict(attrs)["alt"], dict(attrs)["src"]))
    if tag == "table":
      self.tables.append([])
    if tag == "tr":
      self.tables[-1].append([])
    if tag in ("td", "th"):
      self.tables[-1][-1].append("")
      if attrs == [("class", "off")]:
        self.shaded.append((len(self.tables[-1]) - 1, len(self.tables[-1][-1]) - 1))
    if tag not in ("meta", "img"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data
    if self.open and self.open[-1] in ("td", "th"):
      self.tables[-1][-1][-1] += data


def audited():
  """Six rows and what was found of them; the last one has no label."""
  names = ["9", "10", "b", "9", "b", None]
  found = graph.Audit(
    order=np.array([4, 0, 2, 1, 3, 5]),
    support=np.array([0.25, 0.75, 0.25, 0.875, 0.0625, np.nan], np.float32),
    margin=np.array([-0.5, 0.5, -0.5, 0.75, -0.875, np.nan], np.float32),
    suggested=np.array([0, 0, 1, 1, 1, -1], np.int32),
    classes=np.array(["10", "9", "b"]),
    num_wrong=3.2,
  )
  # The first row is close to three others.
  indices = np.tile([[3, 4, 2]], [6, 1])
  distances = np.tile(np.float32([[1, 2, 3]]), [6, 1])
  distances[0] = 0.01, 0.02, 0.03
  neighbors = ranger.Neighbors(indices, distances, np.full([6, 3], 1 / 3))
  return found, np.array(names, object), neighbors


@pytest.mark.parametrize("many", [False, True])
def test_the_page_shows_what_was_found(many, monkeypatch):
  images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1)
  result = _page.findings(*audited(), images)
  if many:
    monkeypatch.setattr(_page, "_MOST_CLASSES", 2)
  page = Parsed()
  page.feed(_page.render(result, "Title", ["A note."]))
  confused, worst, near = page.tables
  if many:
    head = ["given", "suggested", "labels"]
    assert confused == [head, ["b", "9", "2"], ["9", "10", "1"]]
  else:
    assert confused == [
      ["", "9", "10", "b"],
      ["9", "", "1", ""],
      ["10", "", "", ""],
      ["b", "2", "", ""],
    ]
    assert page.shaded == [(1, 1), (2, 2), (3, 3)]
  assert worst == [
    ["row", "given", "suggested", "support"],
    ["4", "b", "9", "0.06"],
    ["0", "9", "10", "0.25"],
    ["2", "b", "9", "0.25"],
    ["1", "10", "10", "0.75"],
    ["3", "9", "9", "0.88"],
  ]
  assert near == [
    ["row", "other row", "label", "other label"],
    ["0", "4", "9", "b"],
    ["0", "2", "9", "b"],
    ["0", "3", "9", "9"],
  ]
  assert "3 pairs of rows are nearly equal; 2 of them" in page.text
  captions = [title for title, _ in page.images]
  assert captions[:2] == ["4: b → 9", "0: 9 → 10"]
  assert captions[-1] == "5:  → "


@pytest.mark.parametrize(
  ("num_wrong", "rows"), [(0.4, []), (2.6, [4, 0, 2]), (9.0, [4, 0, 2, 1, 3])]
)
def test_as_many_rows_are_suspicious_as_are_wrong(num_wrong, rows):
  found, labels, neighbors = audited()
  result = _page.findings(found._replace(num_wrong=num_wrong), labels, neighbors)
  assert result.suspicious.tolist() == rows
  assert ("No label is likely wrong." in _page.render(result, "", [])) == (not rows)


def test_the_page_is_whole_and_escapes_names(tmp_path):
  names = ["<script>alert(1)</script>" if x == "1" else 'a & "b"' for x in GIVEN]
  x = points()
  x[11] = x[10]  # A duplicate with another label.
  x = x.reshape(N, 1, 3)
  images = ("x.npy", x)
  assert run(tmp_path, images, ("y.txt", "\n".join(names)), "--images", "1x3") == 0
  text = (tmp_path / "out" / "audit.html").read_text()
  page = Parsed()
  page.feed(text)
  assert not page.open
  assert "<script" not in text
  assert "<script>alert(1)</script>" in page.text
  assert (
    "1 pairs of rows are nearly equal; 1 of them have different labels" in page.text
  )
  assert len(page.images) == N
  start = "data:image/png;base64,"
  for title, source in page.images:
    row = int(title.partition(":")[0])
    picture = _page.png(_page._as_bytes(x)[row])
    assert source == start + base64.b64encode(picture).decode()
  assert "http" not in text


def test_images_are_written_as_they_are(tmp_path):
  from matplotlib import image as image_

  rng = np.random.default_rng(0)
  for shape in ([5, 7], [4, 6, 3]):
    pixels = rng.integers(0, 256, shape, np.uint8)
    (tmp_path / "a.png").write_bytes(_page.png(pixels))
    np.testing.assert_array_equal(
      (255 * image_.imread(tmp_path / "a.png")).round(), pixels
    )


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e30])
def test_images_of_any_range_fill_that_of_bytes(size):
  image = np.array([[[-1.0, 0.0], [np.nan, 3.0]]], np.float32) * np.float32(size)
  found = _page._as_bytes(image)
  assert found.dtype == np.uint8
  np.testing.assert_allclose(found[0], [[0, 63], [0, 255]], atol=1)
  pixels = np.array([[[7, 9]]], np.uint8)
  np.testing.assert_array_equal(_page._as_bytes(pixels), pixels)
  np.testing.assert_array_equal(_page._as_bytes(pixels[..., None]), pixels)


@pytest.mark.parametrize("classes", [None, ["0", "b"]])
def test_the_first_class_has_a_name(classes):
  found = types.SimpleNamespace(classes=classes)
  assert [_page._name(found, label) for label in (0, -1)] == ["0", ""]


def test_near_duplicates_with_other_labels_come_first():
  x = points()
  x[20], x[30], x[31] = x[21], x[32] + 1e-4, x[33]
  x[20] = x[22]
  neighbors = graph.build(x, 5, backend="jax")
  pairs = _page.near_duplicates(neighbors, ["b" if i == 30 else "a" for i in range(N)])
  assert pairs.tolist() == [[30, 32], [20, 22], [31, 33]]


def test_it_finds_what_the_function_finds_as_a_process(tmp_path):
  pixels, labels = (part[:600] for part in datasets.load_digits(return_X_y=True))
  labels = labels.copy()
  labels[:50] = (labels[:50] + 1) % 10
  np.save(tmp_path / "x.npy", pixels)
  np.save(tmp_path / "y.npy", labels)
  paths = [str(tmp_path / name) for name in ("x.npy", "y.npy")]
  arguments = [*paths, "--images", "8x8", "--out", str(tmp_path / "out")]
  done = subprocess.run(
    [sys.executable, "-m", "optax_ranger", "audit", *arguments],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  predictions = graph.held_out_predictions(pixels, labels)
  found = graph.audit(
    graph.build(pixels, 20), labels, predictions=predictions, score="posterior"
  )
  rows = table(tmp_path)
  assert [int(row["row"]) for row in rows] == found.order.tolist()
  likely = sum(row["likely_wrong"] == "1" for row in rows)
  assert likely == round(found.num_wrong)
  assert f"About {likely} labels ({likely / len(labels):.1%})" in done.stdout
  shown = [line.split() for line in done.stdout.splitlines()]
  start = shown.index(["row", "given", "suggested", "support"]) + 1
  for i, row, line in zip(found.order, rows, shown[start:][:20], strict=False):
    names = [str(labels[i]), str(found.suggested[i])]
    assert [row["given"], row["suggested"]] == names
    assert float(row["support"]) == pytest.approx(found.support[i], abs=1e-4)
    assert line == [str(i), *names, f"{found.support[i]:.2f}"]
  assert not shown[start + 20]


def test_the_metric_is_that_of_the_graph(tmp_path):
  rng = np.random.default_rng(3)
  x = rng.normal(size=[N, 3]) * rng.uniform(0.1, 10, [N, 1])
  tables = []
  for metric in ("euclidean", "cosine"):
    assert run(tmp_path, ("x.npy", x), GOOD_LABELS, "--metric", metric) == 0
    tables.append([int(row["row"]) for row in table(tmp_path)])
    neighbors = graph.build(x, 5, metric=metric)
    assert tables[-1] == graph.audit(neighbors, np.int32(LABELS)).order.tolist()
  assert tables[0] != tables[1]


def test_rows_that_are_images():
  images = lambda shape, option=None: command._images(np.zeros(shape), option)
  for shape in ([2, 3, 4], [2, 3, 4, 1], [2, 3, 4, 3]):
    assert images(shape).shape == tuple(shape)
  assert images([2, 12]) is None
  assert images([2, 3, 4, 2]) is None
  assert images([2, 12], "3X4").shape == (2, 3, 4)
  assert images([2, 36], "3x4x3").shape == (2, 3, 4, 3)


def test_which_labels_of_a_file(tmp_path):
  several = write(tmp_path / "y.npz", {"b": [1, 0], "label": [0, 1]})
  assert _tables.read_labels(several, 2).tolist() == [0, 1]
  assert _tables.read_labels(several, 2, "b").tolist() == [1, 0]
  features = {"other": points(), "x": points() + 1}
  found = _tables.read_features(write(tmp_path / "x.npz", features))
  np.testing.assert_array_equal(found, points() + 1)
  gaps = write(tmp_path / "y.txt", "a\n\n b \n")
  assert _tables.read_labels(gaps, 3).tolist() == ["a", None, "b"]
  table = write(tmp_path / "y.csv", "id,label\n7,\n8,3\n")
  assert _tables.read_labels(table, 2).tolist() == [None, 3]
  assert _tables.read_labels(table, 2, "id").tolist() == [7, 8]


def test_fractions_are_no_integers(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path = tmp_path / "y.parquet"
  for values, wanted in (([1.0, 2.0], [1, 2]), ([1.5, 1.0], [1.5, 1.0])):
    parquet.write_table(pyarrow.table({"label": values}), path)
    assert _tables.read_labels(path, 2).tolist() == wanted
