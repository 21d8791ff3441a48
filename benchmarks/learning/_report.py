"""The tables of all learning studies as Markdown, and what their pictures share."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.learning import _method
from benchmarks.learning import problems

Row = Mapping[str, str]
Titles = Mapping[str, str]
_BOTH = ("last", "selected")
_NOT_SHARES = ("none", "outlier features", "conflicting duplicates", "boundary labels",
  "heavy tails", "gross errors")  # fmt: skip


class Figures:
  """Rows by what they are of: a figure of each seed."""

  def __init__(self, rows: Iterable[Row]):
    self._rows: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
      noise = row["noise"], float(row["rate"])
      key = row["problem"], row["model"], row["method"], noise
      self._rows.setdefault(key, {})[int(row["seed"])] = row

  def places(self) -> list[tuple[str, str]]:
    """Problems and models, in the order of `problems.SPECS`."""
    order = list(problems.SPECS)
    found = {key[:2] for key in self._rows}
    models = lambda place: problems.SPECS[place[0]].models.index(place[1])
    return sorted(found, key=lambda place: (order.index(place[0]), models(place)))

  def noises(self, problem: str, model: str) -> list[problems.Noise]:
    found = {key[3] for key in self._rows if key[:2] == (problem, model)}
    return [noise for noise in problems.SPECS[problem].noises if noise in found]

  def by_seed(
    self, place: tuple[str, str], method: str, noise: problems.Noise, what: str
  ) -> dict[int, float]:
    rows = self._rows.get((*place, method, noise), {})
    return {seed: float(row[what]) for seed, row in rows.items()}

  def of(
    self, place: tuple[str, str], method: str, noise: problems.Noise, what: str
  ) -> np.ndarray:
    return np.array(list(self.by_seed(place, method, noise, what).values()))


def markdown(
  heading: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1
) -> str:
  """A table whose first columns are aligned to the left."""
  rule = ["---"] * left + ["---:"] * (len(heading) - left)
  return "\n".join("| " + " | ".join(line) + " |" for line in (heading, rule, *lines))


def heading(noise: problems.Noise) -> str:
  kind, rate = noise
  if kind in _NOT_SHARES:
    return kind if kind == "none" else f"{kind} {rate:g}"
  return f"{kind} {rate:.0%}" if rate else "clean"


def table(
  figures: Figures,
  place: tuple[str, str],
  titles: Titles,
  kinds: Sequence[str] = _BOTH,
  *,
  seconds: bool = True,
) -> str:
  """Mean and standard deviation of each method, by noise; the best of one kind bold."""
  columns, lines = figures.noises(*place), []
  means = [
    [figures.of(place, name, noise, kinds[0]) for name in titles] for noise in columns
  ]
  best = [
    max((part.mean() for part in column if len(part)), default=0.0) for column in means
  ]
  for name, title in titles.items():
    cells = []
    for noise, most in zip(columns, best, strict=True):
      parts = [figures.of(place, name, noise, kind) for kind in kinds]
      text = " / ".join(_mean(part) for part in parts) if len(parts[0]) else "-"
      bold = len(kinds) == 1 and len(parts[0]) and parts[0].mean() == most
      cells.append(f"**{text}**" if bold else text)
    if set(cells) != {"-"}:
      took = [figures.of(place, name, noise, "seconds") for noise in columns]
      time = [f"{np.median(np.concatenate(took)):.1f}"] if seconds else []
      lines.append([title, *cells, *time])
  heads = ["method", *map(heading, columns), *(["seconds"] if seconds else [])]
  return markdown(heads, lines)


def _mean(values: np.ndarray) -> str:
  spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
  return f"{values.mean():.3f}{spread}"


def summary(figures: Figures, place: tuple[str, str], titles: Titles) -> str:
  """The table in short: the better of both means of each method, by column."""
  columns = problems.SPECS[place[0]].noises
  lines = []
  for name, title in titles.items():
    cells = []
    for noise in columns:
      both = [figures.of(place, name, noise, kind) for kind in _BOTH]
      cells.append(f"{max(x.mean() for x in both):.3f}" if len(both[0]) else "-")
    if set(cells) != {"-"}:
      lines.append([title, *cells])
  return markdown(["method", *map(heading, columns)], lines)


def paired(
  one: Mapping[int, float], other: Mapping[int, float]
) -> tuple[np.ndarray, np.ndarray]:
  """Figures of the seeds that both have."""
  seeds = sorted(set(one) & set(other))
  first, second = (np.array([part[s] for s in seeds]) for part in (one, other))
  return first, second


def error(gain: np.ndarray) -> float:
  """The standard error of a mean."""
  return gain.std(ddof=1) / np.sqrt(len(gain))


def verdicts(
  figures: Figures,
  place: tuple[str, str],
  titles: Titles,
  rivals: Iterable[str],
  *,
  ours: str = "ranger",
  told: bool = True,
) -> str:
  """One method's last epochs against the better of two figures of the best rival.

  Args:
    figures: all of them.
    place: problem and model.
    titles: of the methods.
    rivals: names of methods.
    ours: the name of the method.
    told: whether the rival is best in hindsight, on clean test examples; else it is
      the one that noisy tuning examples choose.
  """
  lines, rivals = [], list(rivals)
  for noise in figures.noises(*place):
    last = figures.by_seed(place, ours, noise, "last")
    found = []
    for name in rivals:
      for kind in _BOTH:
        ours_and_theirs = paired(last, figures.by_seed(place, name, noise, kind))
        judged = figures.of(place, name, noise, kind if told else f"tuning_{kind}")
        if len(ours_and_theirs[0]) > 1:
          score = ours_and_theirs[1].mean() if told else judged.mean()
          found.append((score, *ours_and_theirs, name, kind))
    if found:
      _, mine, theirs, name, kind = max(found, key=lambda rival: rival[0])
      gain = mine - theirs
      text = [heading(noise), f"{mine.mean():.4f}", f"{theirs.mean():.4f}"]
      text += [f"{titles[name]}, {kind}", f"{gain.mean():+.4f} ± {error(gain):.4f}"]
      lines.append(text)
  rival = "best rival" if told else "rival that noisy examples choose"
  heads = ["noise", titles[ours], rival, "its name"]
  heads.append("difference ± standard error of pairs")
  lines_of = markdown(heads, lines).split("\n")
  lines_of[1] = "| --- | ---: | ---: | --- | ---: |"
  return "\n".join(lines_of)


def ablations(
  figures: Figures, place: tuple[str, str], titles: Titles, whole: str = "ranger"
) -> str:
  """What changes when a part is left out, or another is put in its place, in points."""
  columns, lines = figures.noises(*place), []
  columns = [noise for noise in columns if noise[1]]
  for name, title in titles.items():
    cells = []
    for noise in columns:
      pair = (figures.by_seed(place, one, noise, "last") for one in (name, whole))
      changed, before = paired(*pair)
      gain = 100 * (changed - before)
      if len(gain) > 1:
        cells.append(f"{gain.mean():+.1f} ± {error(gain):.1f}")
    if columns and len(cells) == len(columns):
      lines.append([title, *cells])
  return markdown(["Ranger, last epoch", *map(heading, columns)], lines)


def choose(
  rows: Iterable[Row], group: Callable[[Row], Any]
) -> dict[Any, dict[str, float]]:
  """The score on noisy tuning examples of each setting of each group, best first.

  The score is the better of two means over the rows: of last and of selected epochs.
  """
  found: dict[Any, dict[str, list[tuple[float, ...]]]] = {}
  for row in rows:
    both = tuple(float(row[f"tuning_{kind}"] or "nan") for kind in _BOTH)
    found.setdefault(group(row), {}).setdefault(row["settings"], []).append(both)
  scores = {}
  for key, settings in found.items():
    mean = {name: float(np.mean(x, axis=0).max()) for name, x in settings.items()}
    scores[key] = dict(sorted(mean.items(), key=lambda item: -item[1]))
  return scores


def settings_table(
  scores: Mapping[tuple[str, ...], Mapping[str, float]], heads: Sequence[str]
) -> str:
  """What was tried, with its score; the taken one bold."""
  lines = []
  for key, settings in scores.items():
    best = next(iter(settings))
    texts = [f"{one or 'as they are'}: {value:.3f}" for one, value in settings.items()]
    texts[list(settings).index(best)] = f"**{texts[0]}**"
    lines.append([*key, "; ".join(texts)])
  return markdown([*heads, "settings: noisy tuning examples"], lines, len(heads) + 1)


def tuning(rows: Iterable[Row]) -> str:
  """What `--tune` found, for each data set, noise and method."""
  heads = ("problem", "model", "method", "noise", "rate")
  return settings_table(choose(rows, lambda row: tuple(row[x] for x in heads)), heads)


def titles(methods: Mapping[str, _method.Method]) -> dict[str, str]:
  return {name: method.title for name, method in methods.items()}


def pyplot() -> Any:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  return plt
