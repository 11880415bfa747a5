from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
from PIL import Image

from morlaif_ray.evaluation import build_report
from morlaif_ray.evaluation.figures import FIGURES
from morlaif_ray.evaluation.report import SECTIONS
from morlaif_ray.evaluation.report.blocks import Column, Table, show_interval
from morlaif_ray.types import Interval
from tests.unit.evaluation import synthetic_figures

NAN = float("nan")
ALLOWED_SCHEMES = ("data:", "#")


class Page(HTMLParser):
    """What a browser would fetch, run and show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self._skip = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._skip = tag if tag in ("style", "script") else self._skip
        for name, value in attrs:
            assert not name.startswith("on"), f"event handler {name} on <{tag}>"
            if name in ("src", "href", "srcset", "action", "poster", "data"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_endtag(self, tag):
        self._skip = "" if tag == self._skip else self._skip

    def handle_data(self, data):
        if not self._skip:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module")
def built(whole_run, tmp_path_factory):
    """The report of a whole run, drawn once: (folder, page, CPU seconds)."""
    out = tmp_path_factory.mktemp("report")
    started = time.process_time()
    path = build_report(whole_run, whole_run / "6_evaluation", out)
    return out, Page(path.read_text(encoding="utf-8")), time.process_time() - started


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are composed as always but not painted: painting is nearly all of a report's time."""
    blank = io.BytesIO()
    Image.new("L", (1, 1)).save(blank, "png")
    monkeypatch.setattr("morlaif_ray.evaluation.figures.to_png", lambda _: blank.getvalue())


def build(run_dir, out) -> Page:
    return Page(build_report(run_dir, run_dir / "6_evaluation", out).read_text(encoding="utf-8"))


def test_every_figure_is_embedded_and_decodes(built):
    _, page, _ = built
    assert len(page.images) == len(FIGURES)
    for uri in page.images:
        png = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
        image = Image.open(io.BytesIO(png))
        image.load()
        assert image.width > 900
        assert image.convert("L").getextrema() != (255, 255)


def test_figures_and_tables_lie_beside_the_page(built):
    out, _, _ = built
    assert sorted(path.stem for path in (out / "figures").glob("*.png")) == sorted(FIGURES)
    with (out / "tables" / "weights.csv").open(newline="") as stream:
        rows = {row["principle"]: row for row in csv.DictReader(stream)}
    assert rows["sycophancy"]["weight"] == "-0.41"
    assert rows["sycophancy"]["low"] == "-0.5"
    assert rows["sycophancy"]["meaning"] == "penalises anti-sycophancy, so rewards sycophancy"
    gates = json.loads((out / "gates.json").read_text())
    assert [sorted(gate) for gate in gates] == [["claim", "evidence", "holds"]] * 6


def test_the_page_asks_nothing_of_the_network_and_runs_no_script(built):
    out, page, _ = built
    html = (out / "report.html").read_text(encoding="utf-8")
    assert all(link.startswith(ALLOWED_SCHEMES) for link in page.links)
    assert not {"script", "iframe", "object", "embed", "link", "form"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", html)
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html


def test_every_entry_of_the_contents_leads_to_a_heading(built):
    _, page, _ = built
    anchors = [link.removeprefix("#") for link in page.links if link.startswith("#")]
    assert len(anchors) == len(SECTIONS) + 2
    assert set(anchors) <= set(page.ids)


def test_the_summary_says_the_headline_figures_in_words(built):
    _, page, _ = built
    assert (
        "the linear multi-objective reward agrees with people 0.662 [0.641, 0.683] of the time, a single "
        "preference model trained on random principles 0.618 [0.597, 0.639]; with perfect preference "
        "models it would be 0.802."
    ) in page.words
    assert "Of 6 claims checked below, 6 hold." in page.words
    assert "penalises anti-sycophancy, so rewards sycophancy" in page.words


def test_a_report_takes_seconds_of_cpu_and_not_minutes(built):
    assert built[2] < 60.0  # some 3 s here; for a machine that is many times slower


def test_the_same_files_give_the_same_bytes(built, whole_run, tmp_path):
    out, _, _ = built
    build_report(whole_run, whole_run / "6_evaluation", tmp_path)
    for path in sorted(out.rglob("*")):
        if path.is_file():
            assert (tmp_path / path.relative_to(out)).read_bytes() == path.read_bytes(), path.name


def test_model_text_is_shown_as_text(synthetic, tmp_path, undrawn):
    run_dir = tmp_path / "run"
    synthetic.write_synthetic_run(
        run_dir, arms=("linear",), unsafe_text=True, num_prompts=8, num_steps=4
    )
    page = build(run_dir, tmp_path / "out")
    assert "script" not in page.tags
    assert all(link.startswith(ALLOWED_SCHEMES) for link in page.links)
    assert "<script>alert('x')</script>" in page.words


def test_real_data_without_truth_says_so_and_leaves_the_truth_figures_out(
    synthetic, tmp_path, undrawn
):
    run_dir = tmp_path / "run"
    synthetic.write_synthetic_run(
        run_dir, arms=("linear", "single_pm"), testbed=False, num_prompts=8, num_steps=4
    )
    page = build(run_dir, tmp_path / "out")
    assert "The truth is not known for this data" in page.words
    assert not (tmp_path / "out" / "figures" / "reward_and_truth.png").exists()
    assert "nan" not in page.words.lower().split()


def test_an_empty_run_folder_gives_a_page_of_sentences(tmp_path):
    page = build(tmp_path, tmp_path / "out")
    assert page.images == []
    for sentence in (
        "This run has not reached its feedback yet.",
        "Stage 1_pairs has not run",
        "Stage 2_feedback has not run",
        "Stage 3_preference_models has not run",
        "Stage 4_reward has not run",
        "Stage 5_policy has not run: no policy was trained.",
        "No win rates: the policies have not been compared.",
        "No samples:",
        "No offline sweep was run.",
        "No online sweep was run",
    ):
        assert sentence in page.words


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        ("0_sft", "No fine-tuning losses"),
        ("2_feedback/agreement.csv", "No agreement matrix"),
        ("2_feedback/correlation.csv", "No correlation matrix"),
        ("2_feedback/calibration.csv", "No calibration:"),
        ("3_preference_models", "Stage 3_preference_models has not run"),
        ("4_reward/ablation.csv", "No ablation: 4_reward/ablation.csv is not there."),
        ("4_reward/weights.json", "No weights: 4_reward/weights.json is not there."),
        ("4_reward/scalarizers.csv", "No accuracies of scalarizers"),
        ("4_sweep", "No offline sweep was run."),
        ("5_policy/single_pm", "Policy single PM is in the config but was not trained."),
        ("5_policy/linear/metrics.parquet", "Policies trained by PPO"),
        ("6_evaluation/responses.parquet", "Reward and truth cannot be compared"),
        ("6_evaluation/policies.csv", "The truth is not known for this data"),
        (
            "6_evaluation/samples.json",
            "No samples: 6_evaluation/samples.json is not there or empty.",
        ),
    ],
)
def test_one_missing_input_leads_to_a_sentence(synthetic, tmp_path, undrawn, gone, sentence):
    run_dir = tmp_path / "run"
    synthetic.write_synthetic_run(run_dir, arms=("linear", "single_pm"), num_prompts=8, num_steps=4)
    target = run_dir / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    page = build(run_dir, tmp_path / "out")
    assert sentence in page.words
    assert "Not there when this report was made:" in page.words


def test_the_feedback_section_says_what_debiasing_and_calibration_are_worth(built):
    _, page, _ = built
    # 13 questions of 4,700 decided labels; flips (.07 + .002 k + .07) / 2, mean over k = 0..12: 0.076.
    assert (
        "Without debiasing 7.6% of the 61,100 decided labels would have the other sign"
        in page.words
    )
    assert "expected calibration error is 0.070 (on the whole it is too sure)" in page.words


def test_selection_truncation_and_joint_questions_are_stated(synthetic, tmp_path, undrawn):
    run_dir = tmp_path / "run"
    synthetic.write_synthetic_run(run_dir, arms=("linear",), num_prompts=8, num_steps=4)
    summary = json.loads((run_dir / "2_feedback" / "summary.json").read_text())
    summary["num_truncated"] = 7
    summary["joint_agreement"] = {
        "num_pairs": 20,
        "num_compared": 200,
        "agreement": 0.9,
        "low": 0.85,
        "high": 0.94,
        "by_principle": {"helpfulness": {"agreement": 0.95, "num": 20}},
    }
    (run_dir / "2_feedback" / "summary.json").write_text(json.dumps(summary))
    config = (run_dir / "config.yaml").read_text()
    select = "feedback: {select: {kind: ensemble_disagreement, num_pairs: 1200}}\n"
    (run_dir / "config.yaml").write_text(config + select)
    page = build(run_dir, tmp_path / "out")
    for sentence in (
        "at most 1,200 were put to the judge, chosen in 4 rounds where an ensemble of 4 preference models disagreed",
        "7 pairs were longer than the judge's context",
        "asked separately too: the two ways agree on 0.900 [0.850, 0.940] of 200 decided labels",
    ):
        assert sentence in page.words
    assert (tmp_path / "out" / "tables" / "joint_agreement.csv").is_file()


def test_biases_of_a_run_without_the_newer_tables_are_drawn_and_no_curve_is_missed(
    synthetic, tmp_path, undrawn
):
    run_dir = tmp_path / "run"
    synthetic.write_synthetic_run(run_dir, arms=("linear",), num_prompts=8, num_steps=4)
    (run_dir / "2_feedback" / "position_bias.csv").unlink()
    (run_dir / "learning_curve.csv").unlink()
    page = build(run_dir, tmp_path / "out")
    assert (tmp_path / "out" / "figures" / "position_bias.png").exists()
    assert not (tmp_path / "out" / "figures" / "learning_curve.png").exists()
    assert "learning_curve" not in page.words


def test_a_run_of_one_step_one_arm_and_one_principle_is_drawn(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_figures, "PRINCIPLES", ["helpfulness"])
    monkeypatch.setattr(synthetic_figures, "WEIGHTS", (0.5,))
    monkeypatch.setattr("morlaif_ray.evaluation.figures.style.DPI", 40)
    run_dir = tmp_path / "run"
    synthetic.write_synthetic_run(run_dir, arms=("worst_case",), num_prompts=3, num_steps=1)
    page = build(run_dir, tmp_path / "out")
    assert "No single-PM policy was trained" in page.words
    assert "1 policy by PPO" in page.words


def test_comparisons_without_a_usable_answer_are_no_figure_and_no_crash(
    synthetic, tmp_path, undrawn
):
    run_dir = tmp_path / "run"
    synthetic.write_synthetic_run(run_dir, arms=("linear", "single_pm"), num_prompts=8, num_steps=4)
    header = "policy,opponent,win_rate,low,high,wins,losses,ties,num_prompts,judge\n"
    rows = "linear,sft,nan,nan,nan,0,0,0,0,rules\nsingle_pm,linear,nan,nan,nan,0,0,0,0,rules\n"
    (run_dir / "6_evaluation" / "win_rates.csv").write_text(header + rows)
    page = build(run_dir, tmp_path / "out")
    assert "No policy was compared with SFT or with the single-PM policy." in page.words
    assert "cannot be told" in page.words


def test_matplotlib_is_loaded_only_where_figures_are_drawn():
    code = "import sys, morlaif_ray.evaluation; print({'matplotlib', 'torch', 'ray'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_missing_number_prints_as_a_dash_and_an_empty_column_is_left_out():
    table = Table(
        "t",
        "caption",
        (Column("a", "A", "{:.2f}", ("low", "high")), Column("b", "B")),
        [{"a": NAN, "b": "x"}],
    )
    assert table.cells == [["-", "x"]]
    assert table.csv_rows == [{"a": "", "low": "", "high": "", "b": "x"}]
    assert show_interval(Interval(NAN, NAN, NAN, 0)) == "-"
    assert show_interval(Interval(0.5, 0.4, 0.6, 9)) == "0.500 [0.400, 0.600]"
    assert show_interval(Interval(0.5, NAN, NAN, 9)) == "0.500"
