"""Opens the site in a browser: `make docs-check`.

Needs Chromium, such as Debian's package. Looks at every page at the widths of a screen
and of a phone, in light and in dark, and keeps screenshots of some.
"""

import argparse
import functools
import http.server
import pathlib
import subprocess
import sys
import threading
from typing import Any

import numpy as np
from playwright import sync_api
from sklearn import datasets
import tqdm

_PHONE, _SCREEN = 400, 1280
# Contrast of text, as WCAG 2.2 asks for (success criterion 1.4.3).
_LEAST_CONTRAST = 4.5
_KEPT = {
  "home": "index.html",
  "guide": "aggregation.html",
  "api": "api/generated/optax_ranger.aggregate_by_upgrad.html",
  "gallery": "gallery/index.html",
  "search": "search.html?q=accumulate",
  "audit": "audit/audit.html",
}

_BROKEN_IMAGES = "[...document.images].filter(i => i.naturalWidth == 0).map(i => i.src)"
_FLAT_FORMULAS = """
[...document.querySelectorAll('article math')].filter(
  m => m.getBoundingClientRect().height < 5 || m.querySelector('merror')).length"""
# By how much anything lies outside of the window, where it can't be scrolled by itself.
_TOO_WIDE = """
() => {
  const scrolls = node => node.tagName != 'ARTICLE' &&
    (/auto|scroll|hidden/.test(getComputedStyle(node).overflowX) ||
     scrolls(node.parentElement));
  const over = [...document.querySelectorAll('article *')].filter(
    n => n.getClientRects().length && !scrolls(n)
  ).map(n => n.getBoundingClientRect().right - innerWidth);
  const root = document.documentElement;
  return Math.max(0, root.scrollWidth - root.clientWidth, ...over);
}"""
# The lowest contrast of any paragraph, cell or piece of code to what lies behind it.
_CONTRAST = """
() => {
  const canvas = new OffscreenCanvas(1, 1);
  const context = canvas.getContext('2d', {willReadFrequently: true});
  const rgba = color => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = color => color.slice(0, 3).map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
  ).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = rgba(getComputedStyle(node).backgroundColor);
      if (color[3] == 255) return color;
    }
    return [255, 255, 255, 255];
  };
  let worst = [21, ''];
  const kinds = 'p, td, th, li, code, a, span';
  for (const node of document.querySelectorAll(`article :is(${kinds})`)) {
    const texts = [...node.childNodes].filter(n => n.nodeType == 3);
    const text = texts.some(n => n.textContent.trim());
    if (!text || !node.getClientRects().length) continue;
    if (getComputedStyle(node).visibility == 'hidden') continue;
    if (node.closest('.headerlink, .copybtn')) continue;
    const [a, b] = [rgba(getComputedStyle(node).color), behind(node)].map(light);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < worst[0]) worst = [contrast, node.textContent.slice(0, 40)];
  }
  return worst;
}"""


def serve(site: pathlib.Path) -> http.server.ThreadingHTTPServer:
  """A server for the site, on a free port."""

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
      pass

  handler = functools.partial(Quiet, directory=str(site))
  server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return server


def faults_of(page: sync_api.Page) -> list[str]:
  """What is wrong with the page that is open."""
  faults = []
  images = page.evaluate(_BROKEN_IMAGES)
  if images:
    faults.append(f"images that do not load: {images}")
  formulas = page.evaluate(_FLAT_FORMULAS)
  if formulas:
    faults.append(f"{formulas} formulas are not drawn")
  for scheme in ("light", "dark"):
    page.emulate_media(color_scheme=scheme)
    contrast, text = page.evaluate(_CONTRAST)
    if contrast < _LEAST_CONTRAST:
      faults.append(f"{scheme}: contrast {contrast:.1f} of {text!r}")
  page.emulate_media(color_scheme="light")
  page.set_viewport_size({"width": _PHONE, "height": 800})
  wider = page.evaluate(_TOO_WIDE)
  if wider > 1:
    faults.append(f"{wider:.0f} pixels too wide for a phone")
  page.set_viewport_size({"width": _SCREEN, "height": 900})
  return faults


def audit_page(site: pathlib.Path) -> str:
  """Writes the page of the command `audit` on digits, some of them labeled wrong."""
  pixels, labels = datasets.load_digits(return_X_y=True)
  labels = np.where(np.arange(len(labels)) % 10 == 0, (labels + 1) % 10, labels)
  folder = site / "audit"
  folder.mkdir(exist_ok=True)
  paths = [folder / "features.npy", folder / "labels.npy"]
  for path, array in zip(paths, (pixels, labels), strict=True):
    np.save(path, array)
  command = [sys.executable, "-m", "optax_ranger", "audit", *paths]
  subprocess.run([*command, "--images", "8x8", "--out", folder], check=True)
  return "audit/audit.html"


def search_faults(page: sync_api.Page, root: str) -> list[str]:
  """Whether the search box finds a step."""
  page.goto(f"{root}/index.html")
  page.locator("input[name=q]").first.fill("accumulate")
  page.keyboard.press("Enter")
  link = page.locator("#search-results a", has_text="optax_ranger.accumulate").first
  try:
    link.wait_for(timeout=10_000)
  except sync_api.TimeoutError:
    return ["the search does not find optax_ranger.accumulate"]
  return []


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("site", type=pathlib.Path)
  parser.add_argument("--chromium", default="/usr/bin/chromium")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="screenshots")
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  server = serve(args.site)
  root = f"http://localhost:{server.server_port}"
  audited = audit_page(args.site)
  paths = sorted(
    str(path.relative_to(args.site))
    for path in args.site.rglob("*.html")
    if "_modules" not in path.parts and path.name != "genindex.html"
  )
  assert audited in paths
  faults, outside = [], set()
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=args.chromium)
    page = browser.new_page(viewport={"width": _SCREEN, "height": 900})
    page.on("request", lambda request: outside.add(request.url))
    page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))
    for path in tqdm.tqdm(paths, unit="page"):
      page.goto(f"{root}/{path}")
      faults += [f"{path}: {fault}" for fault in faults_of(page)]
    faults += search_faults(page, root)
    for name, path in _KEPT.items():
      page.goto(f"{root}/{path}")
      page.wait_for_timeout(1000)
      page.screenshot(path=args.out / f"{name}.png")
    page.set_viewport_size({"width": _PHONE, "height": 800})
    page.emulate_media(color_scheme="dark")
    page.goto(f"{root}/{_KEPT['guide']}")
    page.screenshot(path=args.out / "phone.png")
    browser.close()
  elsewhere = sorted(url for url in outside if not url.startswith((root, "data:")))
  faults += [f"needs the network: {url}" for url in elsewhere]
  print("\n".join(faults) or f"{len(paths)} pages, no fault")
  return 1 if faults else 0


if __name__ == "__main__":
  sys.exit(main())
