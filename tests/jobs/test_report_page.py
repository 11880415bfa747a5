"""Job `report`, and its page in a real browser (headless Chromium; skipped where there is none)."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from jobs import report
from jobs.context import JobContext
from jobs.progress import Reporter
from morlaif_ray.artifacts import read_manifest
from morlaif_ray.config import load_config
from morlaif_ray.errors import ArtifactError
from morlaif_ray.evaluation.figures import FIGURES
from tests.unit.evaluation.synthetic_run import write_synthetic_run

pytestmark = pytest.mark.jobs

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on PATH; apt-get install chromium to open the report in it",
)
BROWSER_TIMEOUT_S = 90
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)
# Measures what a reader would see; runs in a copy of the page whose policy, which forbids scripts, is taken out.
PROBE = """<script>addEventListener("load", () => { document.title = JSON.stringify({
  widths: [...document.images].map(image => image.naturalWidth),
  headings: [...document.querySelectorAll("h1, h2")].map(heading => heading.textContent),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  requests: performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 5)),
}) })</script></body>"""


def context_of(run_dir: Path) -> JobContext:
    return JobContext(load_config(run_dir / "config.yaml"), run_dir.absolute(), Reporter())


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """A synthetic run on which job `report` has run once."""
    run_dir = tmp_path_factory.mktemp("reported") / "run"
    write_synthetic_run(run_dir)
    report.run(context_of(run_dir))
    return run_dir


def browse(arguments: list[str], profile: Path) -> bytes:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=BROWSER_TIMEOUT_S, check=True)
    return done.stdout


def test_the_job_publishes_the_report_whole_and_copies_the_page(reported):
    published = reported / "6_evaluation"
    manifest = read_manifest(published)
    assert manifest is not None
    assert {"report.html", "gates.json", "responses.parquet", "win_rates.csv"} <= set(
        manifest.files
    )
    assert {f"figures/{name}.png" for name in FIGURES} <= set(manifest.files)
    assert manifest.rows == {"rows": 96}
    assert (reported / "report.html").read_bytes() == (published / "report.html").read_bytes()
    assert not list(reported.glob(".*"))


def test_the_job_keeps_the_recipe_and_leaves_the_old_folder_in_superseded(reported):
    old = read_manifest(reported / "superseded" / "6_evaluation.1")
    new = read_manifest(reported / "6_evaluation")
    assert old is not None
    assert new is not None
    assert old.recipe_hash == new.recipe_hash


def test_an_unchanged_report_is_not_published_again(reported):
    before = sorted(path.name for path in (reported / "superseded").iterdir())
    report.run(context_of(reported))
    assert sorted(path.name for path in (reported / "superseded").iterdir()) == before


def test_a_run_without_evaluation_says_what_to_run_first(tmp_path):
    write_synthetic_run(tmp_path, arms=("linear",), num_prompts=4, num_steps=2)
    shutil.rmtree(tmp_path / "6_evaluation")
    with pytest.raises(ArtifactError, match="not published yet; run 'morlaif evaluate' first"):
        report.run(context_of(tmp_path))


@needs_chromium
@pytest.mark.browser
@pytest.mark.parametrize("width", [1400, 500])
def test_the_page_opens_in_chromium_with_every_figure_and_no_sideways_scroll(
    reported, tmp_path, width
):
    html = (reported / "report.html").read_text(encoding="utf-8")
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    copy = tmp_path / "page.html"
    copy.write_text(html.replace("</body>", PROBE), encoding="utf-8")
    dom = browse(
        [f"--window-size={width},1200", "--dump-dom", copy.as_uri()], tmp_path / "profile"
    ).decode()
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    seen = json.loads(title.group(1).replace("&amp;", "&"))
    assert len(seen["widths"]) == len(FIGURES)
    assert min(seen["widths"]) > 0
    assert seen["overflow"] <= 0
    assert set(seen["requests"]) <= {"data:"}
    for heading in (
        "synthetic",
        "Claims",
        "Preference models",
        "Win rates",
        "Reproducing this run",
    ):
        assert heading in seen["headings"]


@needs_chromium
@pytest.mark.browser
def test_the_page_is_painted_under_its_own_security_policy(reported, tmp_path):
    shot = tmp_path / "shot.png"
    page = (reported / "report.html").as_uri()
    browse(["--window-size=1000,1400", f"--screenshot={shot}", page], tmp_path / "profile")
    image = Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")
    assert image.size == (1000, 1400)
    # The styled page holds the green of a claim that holds: without its style sheet it would be black on white.
    assert (0xE0, 0xF3, 0xEC) in {colour for _, colour in image.getcolors(1 << 24) or []}
