"""The gallery: a page for each program of `examples/`, and a table of the gains.

`python docs/_extensions/gallery.py out` keeps the results that programs left in `out`,
and writes the table anew.
"""

import argparse
import ast
import json
import pathlib
import re
import shutil

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FOLDER = ROOT / "docs" / "gallery"
# Further comparisons of a program: figures, problem, without, with.
MORE = {
  "cartpole": [
    (
      "results",
      "the same, from a tenth of the best learning rate",
      "Adam, checked mean, rate 0.001",
      "NGS, checked mean, rate 0.001",
    ),
  ],
  "recommendation": [
    ("rare movies", "the same, movies with few ratings", "factorization", "regions"),
  ],
  "speech": [("words", "the same, words", "512 frames, mean", "64 frames, mean")],
}


def programs() -> list[str]:
  """The names of all programs."""
  return sorted(path.stem for path in EXAMPLES.glob("*.py"))


def title(name: str) -> str:
  return name.replace("_", " ").capitalize()


def results(name: str) -> dict | None:
  """What the program has measured; None if it measures nothing."""
  path = FOLDER / f"{name}.json"
  return json.loads(path.read_text()) if path.exists() else None


def mean_and_error(values) -> str:
  """The mean of several seeds and its standard error."""
  values = np.asarray(values, float)
  digits = 3 if abs(values.mean()) < 10 else 1
  text = f"{values.mean():.{digits}f}"
  if len(values) > 1:
    text += f" ± {values.std(ddof=1) / np.sqrt(len(values)):.{digits}f}"
  return text


def gain(found: dict) -> str:
  """The difference of the two methods, or that there is none."""
  ours, baseline = (
    np.asarray(found["results"][found[key]], float) for key in ("ours", "baseline")
  )
  differences = ours - baseline
  digits = 3 if abs(baseline.mean()) < 10 else 1
  text = f"{differences.mean():+.{digits}f}"
  if len(differences) == 1:
    return f"{text} (one seed)"
  error = differences.std(ddof=1) / np.sqrt(len(differences))
  if abs(differences.mean()) <= 2 * error:
    return f"none ({text} ± {error:.{digits}f})"
  worse = (differences.mean() > 0) != (found["better"] == "higher")
  return text + (", worse" if worse else "")


def table() -> str:
  """A row for each program, then those that measure no gain."""
  rows = [
    "| program | problem | without | with optax_ranger | gain |",
    "| --- | --- | --- | --- | --- |",
  ]
  others = []
  for name in programs():
    link, found = f"[`{name}.py`](../../examples/{name}.py)", results(name)
    if found is None:
      others.append(f"- {link}: {_docstring(name).splitlines()[0]}")
      continue
    compared = [("results", found["problem"], found["baseline"], found["ours"])]
    for figures, problem, baseline, ours in compared + MORE.get(name, []):
      one = found | {"results": found[figures], "baseline": baseline, "ours": ours}
      cells = [link, f"{problem}: {found['measure']}"]
      for method in (baseline, ours):
        cells.append(f"{method}: {mean_and_error(found[figures][method])}")
      cells.append(gain(one))
      rows.append(f"| {' | '.join(cells)} |")
  return "\n".join([*rows, "", "Without a figure:", "", *others])


def _docstring(name: str) -> str:
  return ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text())) or ""


def page(name: str) -> str:
  """The page of a program, from its docstring, picture, results and code."""
  parts, found = [f"# {title(name)}", _docstring(name)], results(name)
  if found:
    seeds = max(map(len, found["results"].values()))
    rows = [f"| method | {found['measure']} |", "| --- | --- |"]
    rows += [f"| {key} | {mean_and_error(v)} |" for key, v in found["results"].items()]
    parts += [
      f"![{found['problem']}: {found['measure']}]({name}.png)",
      "\n".join(rows),
      f"Mean and standard error; number of seeds: {seeds}. Gain: {gain(found)}.",
    ]
  parts.append(
    f"```{{literalinclude}} ../../examples/{name}.py\n:language: python\n```"
  )
  return "\n\n".join(parts) + "\n"


def write_pages(app) -> None:
  for path in set(FOLDER.glob("*.md")) - {FOLDER / "index.md"}:
    path.unlink()  # Its program may be gone.
  for name in programs():
    (FOLDER / f"{name}.md").write_text(page(name))


def write_table() -> None:
  index = FOLDER / "index.md"
  text = f"<!-- gains -->\n\n{table()}\n\n<!-- end -->"
  index.write_text(
    re.sub(
      "<!-- gains -->.*?<!-- end -->", lambda _: text, index.read_text(), flags=re.S
    )
  )


def to_pages(app, name, source):
  """On the site, the table links to the pages of the programs."""
  if name == "gallery/index":
    source[0] = re.sub(r"\]\(\.\./\.\./examples/(\w+)\.py", r"](\1.md", source[0])


def setup(app):
  app.connect("builder-inited", write_pages)
  app.connect("source-read", to_pages)
  return {"parallel_read_safe": True, "parallel_write_safe": True}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("out", type=pathlib.Path, help="where the programs wrote results")
  args = parser.parse_args()
  for name in programs():
    for path in (args.out / f"{name}.json", args.out / f"{name}.png"):
      if path.exists():
        shutil.copy(path, FOLDER / path.name)
  write_table()


if __name__ == "__main__":
  main()
