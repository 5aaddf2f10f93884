"""How long a report of many layers takes: to write, to open in Chromium, to sort and to search.

    python benchmarks/report_page/run.py [--layers 300] [--repeat 5] [--json result.json]

A run is made of JSON (tests/report_runs.py) with everything that a layer can have. Times in the
browser are those of the page's own clock, from the start of its loading; the middle of the repeats
is told. charts_cpu is what the page's thread has worked until then, whatever else the machine did.
Needs playwright and a chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from lighten import report  # noqa: E402
from report_runs import look, make_run  # noqa: E402

WATCH = """
window.marks = {};
const mark = (name) => { window.marks[name] ??= performance.now(); };
const watch = () => {
  const root = document.documentElement;
  if (root?.dataset.ready) mark("page");
  if (root?.dataset.ready === "charts") mark("plotly");
  const inSight = [...document.querySelectorAll(".chart[data-chart]")].filter((el) =>
    el.getBoundingClientRect().top < innerHeight);
  const drawn = (el) => el?.querySelector(".main-svg");
  const tree = document.querySelector("[data-chart^=treemap]");
  if (window.marks.plotly && drawn(tree) && inSight.every(drawn)) mark("charts");
  if (!window.marks.charts) requestAnimationFrame(watch);
};
requestAnimationFrame(watch);
"""
"""charts: those in sight, and the treemap of all layers, are drawn."""

TIMED = """async (act) => {
  const began = performance.now();
  eval(act);
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - began;
}"""
"""From an act until the next frame has been painted."""

ACTS = {
    "sort": "document.querySelector('[data-sort=sensitivity]').click()",
    "search": "const s = document.querySelector('#search'); s.value = 'blocks.7 up';"
    "s.dispatchEvent(new Event('input'))",
    "panel": "document.querySelector('#layers tbody tr:not([hidden])').click()",
    "language": "document.querySelector('[data-lang=zh]').click()",
}


def opened(browser: Any, path: Path) -> dict[str, float]:
    """Milliseconds of one visit."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, bypass_csp=True)
    page = context.new_page()
    page.add_init_script(WATCH)
    tools = context.new_cdp_session(page)
    tools.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(path.as_uri())
    page.wait_for_function("() => window.marks.plotly")
    page.evaluate("document.querySelector('[data-chart^=treemap]').scrollIntoView()")
    page.wait_for_function("() => window.marks.charts")
    metrics = {m["name"]: m["value"] for m in tools.send("Performance.getMetrics")["metrics"]}
    found: dict[str, float] = page.evaluate("window.marks")
    found["charts_cpu"] = 1000 * metrics["TaskDuration"]
    for name, act in ACTS.items():
        found[name] = page.evaluate(TIMED, act)
    context.close()
    return found


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as player:
        run = make_run(Path(folder) / "run", "text", shown=look("text", args.layers), history=True)
        writes = []
        for _ in range(args.repeat):
            began = time.perf_counter()
            path = report.write(run, lang="en")
            writes.append(1000 * (time.perf_counter() - began))
        browser = player.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=[] if os.geteuid() else ["--no-sandbox"],
        )
        visits = [opened(browser, path) for _ in range(args.repeat)]
        found = {
            "layers": args.layers,
            "page_bytes": path.stat().st_size,
            "write_first_ms": round(writes[0], 1),
            "write_ms": round(statistics.median(writes), 1),
            **{
                f"{name}_ms": round(statistics.median(v[name] for v in visits), 1)
                for name in visits[0]
            },
            "repeat": args.repeat,
            "chromium": browser.version,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_before": round(load, 2),
        }
        browser.close()
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
