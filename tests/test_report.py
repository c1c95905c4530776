import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import picture
from PIL import Image

from evaluation import figures
from evaluation.metrics import METRIC_RANGE, METRICS, binary_metrics, calibration
from evaluation.mistakes import Mistake
from evaluation.report import STYLE_SHEET, write_report
from evaluation.tables import COLUMNS, OPERATING, number

HOSTILE = "<script>alert(1)</script>\"'&$x_1$\udcff\u202e\n"
HOSTILE_SHOWN = "<script>alert(1)</script>\"'&$x_1$\\udcff\\u202e\\n"
LEVELS = {
    "jpeg": (100, 90, 80, 70, 60, 50, 40, 30),
    "blur": (1, 2, 3, 4, 5),
    "noise": (0.05, 0.1, 0.15, 0.2, 0.25),
    "resize": (0.75, 0.5, 0.25),
}
VOID = {"meta", "br", "img", "input", "hr", "link"}


def evaluation(
    names: list[str], size: int = 60, intervals: bool = True, robust: bool = True, mistakes: int = 3, **run: object
) -> tuple:
    """The arguments of write_report after the path: what inference.py would find for generators with these names."""
    rng, results, comparisons = np.random.default_rng(0), {}, {}

    def with_intervals(row: dict) -> dict:
        return row | (
            {
                "intervals": {
                    metric: [0.9 * row[metric], min(1.02 * row[metric], top)] for metric, top in METRIC_RANGE.items()
                }
            }
            if intervals
            else {}
        )

    for i, name in enumerate(names):
        labels = np.repeat([0, 1], size)
        comparisons[name] = labels, np.concatenate([rng.beta(0.4, 3, size), rng.beta(1 + i % 4, 0.5, size)])
        results[name] = with_intervals(binary_metrics(*comparisons[name], 0.83) | {"seen": i == 0})
    worst = min(names, key=lambda name: results[name]["auc"])
    table = {metric: [results[name][metric] for name in names] for metric in METRICS}
    results["Mean"] = with_intervals({metric: float(np.mean(values)) for metric, values in table.items()})
    results["Std"] = {metric: float(np.std(values)) for metric, values in table.items()}
    results["Worst"] = {"generator": worst} | {metric: results[worst][metric] for metric in METRICS}
    results["Run"] = {
        "checkpoint": "output_model/best_model.pth",
        "checkpoint_sha256": "3f" * 32,
        "val_threshold": 0.83,
        "threshold": 0.83,
        "temperature": 1.7,
        "protocol": "native",
        "split": "test",
        "arguments": {"bootstrap": 1000, "datasets": None},
        "train_arguments": {"lr": 1e-4, "without": []},
        "datasets_trained": ["real/FFHQ"],
        "versions": {"torch": "2.14.1"},
        "warnings": [],
        "sources": {"real/FFHQ": {"JPEG 1024x1024": 60}},
    } | run
    rows = [{"corruption": "none", "level": 0} | {name: results[name] for name in (*names, "Mean")}]
    for corruption, levels in LEVELS.items():
        for step, level in enumerate(levels, 1):
            of = {
                name: results[name] | {"auc": 0.5 + (results[name]["auc"] - 0.5) * 0.9**step}
                for name in (*names, "Mean")
            }
            rows.append({"corruption": corruption, "level": level} | of)
    wrong = [
        Mistake(np.asarray(picture(224, 224, i)), f"fake/{names[0]}/{i:03}.png", i % 2, 0.9 - 0.8 * (i % 2))
        for i in range(mistakes)
    ]
    shares = {"0.01": {"rate": 0.02, "low": 0.011, "high": 0.057}, "0.05": {"rate": 0.05, "low": 0.03, "high": 0.09}}
    operating = {
        "thresholds": {"0.01": 0.9312, "0.05": 0.612},
        "collections": {"real/FFHQ": {"n": size, "false_alarms": shares}},
        "generators": {name: {"n": size, "found": shares} for name in names},
    }
    return results, comparisons, wrong, rows if robust else None, operating


class Page(HTMLParser):
    """Reads a page as a strict reader would: every tag is closed in its order."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words = [], [], []
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    def having(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(tmp_path: Path, *arguments: object) -> tuple[str, Page]:
    """The report's source, and the page that it is, checked for what every report has to be."""
    write_report(tmp_path / "report.html", *arguments)
    # nothing half-written is left
    assert [path.name for path in tmp_path.iterdir() if "report" in path.name] == ["report.html"]
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', source)) <= set(ids)
    # one file, which asks for no other and runs nothing
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert (
        "@import" not in source
        and not re.search(r"url\((?!#)", source)
        and "http:" not in source
        and "https:" not in source
    )
    assert all(
        value.startswith(("#", "data:image/jpeg;base64,"))
        for name in ("src", "href")
        for value in page.attributes(name)
    )
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "default-src 'none'" in source
    assert figures.INK not in source and "nan" not in re.findall(r"[a-z]+", " ".join(page.attributes("d")).lower())
    for chart in page.having("svg"):
        assert chart.get("aria-label") or chart.get("aria-hidden") == "true"
        assert "viewbox" in chart and "width" not in chart
    assert all(image["alt"] for image in page.having("img"))
    return source, page


# ------------------------------------------------------------------------------------------------------------- contents


@pytest.mark.slow
def test_everything_is_there(tmp_path):
    warnings = ["StarGAN: the format of its files tells it from the real ones (PNG; real: JPEG)"]
    arguments = evaluation(["StyleGAN3", "StarGAN"], warnings=warnings)
    results, comparisons, mistakes, robustness, _ = arguments
    source, page = written(tmp_path, *arguments)
    for name in ("StyleGAN3", "StarGAN", "Mean", "Worst"):
        for metric, *_ in COLUMNS:
            assert number(metric, results[name][metric]) in page.words, (name, metric)
    for name, metric in itertools.product(("StyleGAN3", "StarGAN", "Mean"), [column.metric for column in OPERATING]):
        assert number(metric, results[name][metric]) in page.words, (name, metric)
    assert {"real/FFHQ", "% at 0.9312 (1 %)", "% at 0.6120 (5 %)", "2.0 [1.1, 5.7]"} <= set(page.words)
    assert "may seem to disagree" in page.text
    assert "fake from 0.9312 on, real below 0.6120" in page.words and {"real", "uncertain"} <= set(page.words)
    for name in ("StyleGAN3", "Mean"):
        low, high = results[name]["intervals"]["auc"]
        assert f"[{low:.3f}, {high:.3f}]" in page.words
    assert f"± {results['Std']['accuracy']:.1f}" in page.words and "60 real" in page.words
    assert page.words.count("seen in training") == page.words.count("unseen") == 1
    assert warnings[0] in page.words and page.text.index(warnings[0]) < page.text.index("Results")
    error = calibration(*(np.concatenate(parts) for parts in zip(*comparisons.values())))[3]
    assert f"{error:.4f}" in page.words
    assert {mistake.path for mistake in mistakes} <= set(page.words) and {"0.9000", "0.1000"} <= set(page.words)
    for word in (
        "3f" * 32,
        "bootstrap",
        "1000",
        "lr",
        "0.0001",
        "real/FFHQ",
        "torch 2.14.1",
        "JPEG 1024x1024 60",
        "validation: 0.83",
    ):
        assert word in page.words, word
    assert len([chart for chart in page.having("svg") if chart.get("role") == "img"]) == 2 + 2 + 1 + 4
    # the axes say what they show: words, not outlines of letters
    assert {
        "real images called fake, share",
        "precision, share",
        "images (log)",
        "AUC",
        "JPEG quality",
        "blur, σ in px",
        "clean",
    } <= set(page.words)
    for line in robustness:
        assert f"{line['Mean']['auc']:.4f}" in page.words
    assert {"ACC\u00a0%", "real\u00a0ACC\u00a0%"} <= set(page.words) and "\\xa0" not in source


def test_mistakes_are_small_pictures(tmp_path):
    _, page = written(tmp_path, *evaluation(["StyleGAN3"], mistakes=2, robust=False))
    images = page.having("img")
    assert [(image["width"], image["height"]) for image in images] == [("112", "112")] * 2 and max(
        len(image["src"]) for image in images
    ) < 10_000


def test_without_intervals_robustness_mistakes_and_warnings(tmp_path):
    results, *others = evaluation(["StyleGAN3"], size=2, intervals=False, robust=False, mistakes=0)
    for row in results.values():
        row.pop("seen", None)
    results["Mean"]["intervals"] = {}
    _, page = written(tmp_path, results, *others)
    assert page.words.count("None.") == 2 and page.text.count("[") == 4, "those of the thresholds, Wilson's, alone"
    assert (
        "Robustness" not in page.words
        and "Before you trust these numbers" not in page.words
        and "unseen" not in page.text
    )


@pytest.mark.slow
@pytest.mark.parametrize("fakes, reals", [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("threshold", [np.nextafter(1, 2), 0.0])
def test_extreme_scores(tmp_path, fakes, reals, threshold):
    run = {"val_threshold": threshold, "threshold": threshold}
    results, comparisons, mistakes, _, operating = evaluation(["StyleGAN3"], size=2, mistakes=1, **run)
    scores = np.array([reals, reals, fakes, fakes])
    labels = comparisons["StyleGAN3"][0]
    results["StyleGAN3"] |= binary_metrics(labels, scores, threshold)
    written(tmp_path, results, {"StyleGAN3": (labels, scores)}, mistakes, None, operating)


@pytest.mark.slow
def test_hostile_names_stay_names(tmp_path):
    results, comparisons, mistakes, robustness, operating = evaluation(
        ["StyleGAN3", HOSTILE], warnings=[HOSTILE], checkpoint=HOSTILE, new_setting={HOSTILE: [HOSTILE]}
    )
    results["Run"] |= {
        "arguments": {HOSTILE: HOSTILE},
        "sources": {HOSTILE: {HOSTILE: 1}},
        "datasets_trained": [HOSTILE],
    }
    mistakes.append(Mistake(mistakes[0].image, f'real/"><img src=x onerror=alert(1)>{HOSTILE}', 0, 0.99))
    robustness[1]["corruption"] = HOSTILE
    source, page = written(tmp_path, results, comparisons, mistakes, robustness, operating)
    assert page.words.count(HOSTILE_SHOWN) >= 7 and "\u202e" not in source
    assert len(page.having("img")) == len(mistakes)
    assert any(HOSTILE_SHOWN in label for label in page.attributes("aria-label"))


@pytest.mark.slow
def test_many_generators(tmp_path):
    names = [f"Generator{i:02}" for i in range(12)]
    source, page = written(tmp_path, *evaluation(names, robust=True))
    assert set(names) <= set(page.words)
    charts = [chart for chart in page.having("svg") if chart.get("role") == "img"]
    assert len(charts) == 2 * 3 + 12 + 1 + 4  # five generators in a pair of curves
    assert len({json.dumps(figures.line_style(i)) for i in range(30)}) == 30
    assert len(source) < 800_000


@pytest.mark.slow
def test_same_input_same_bytes(tmp_path):
    arguments = evaluation(["StyleGAN3"])
    source, _ = written(tmp_path, *arguments)
    assert written(tmp_path, *arguments)[0] == source


def test_an_earlier_report_survives_a_failure(tmp_path):
    results, *others = evaluation(["StyleGAN3"], size=2)
    (tmp_path / "report.html").write_text("earlier")
    del results["Mean"]
    with pytest.raises(KeyError):
        write_report(tmp_path / "report.html", results, *others)
    assert (tmp_path / "report.html").read_text() == "earlier"


# --------------------------------------------------------------------------------------------------------------- charts


@pytest.mark.slow
def test_robustness_curves(tmp_path):
    names = ["StyleGAN3", HOSTILE, *(f"A generator with quite a long name {i}" for i in range(28))]
    rows = evaluation(names, size=10)[3]
    figure = figures.robustness_curves(rows, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").format == "PNG"
    assert len(figure.axes) == 4 and len({axes.get_ylim() for axes in figure.axes}) == 1
    mean = figure.axes[0].lines[len(names)].get_ydata()
    assert np.allclose(mean, [row["Mean"]["auc"] for row in rows[:9]])  # from the clean value on
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["0", "1", "2", "3", "4", "5"]
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1 and legend.y0 >= 0
    assert legend.y1 <= min(axes.get_tightbbox().y0 for axes in figure.axes) + 1
    assert figures.robustness_curves(rows, None).axes  # drawn only


def test_colours_are_seen_on_both_pages():
    def luminance(colour: str) -> float:
        linear = [
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in matplotlib.colors.to_rgb(colour)
        ]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    pages = re.findall(r"--page: (#\w+)", STYLE_SHEET)
    assert len(pages) == 2
    for page in map(luminance, pages):
        for colour in map(luminance, figures.SERIES):
            assert (max(page, colour) + 0.05) / (min(page, colour) + 0.05) >= 3  # WCAG 2.2, 1.4.11


# ----------------------------------------------------------------------------------------------------------------
# Chromium


def chromium(tmp_path: Path, url: str, *options: str) -> tuple[str, str]:
    """What Chromium makes of a page, as HTML, and what it says on its console."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium here")
    # Without its sandbox, which root and some containers do not get; the page is our own.
    command = [
        program,
        *"--headless --no-sandbox --disable-gpu".split(),
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        *options,
        url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def measured(tmp_path: Path, sources: list[str], *options: str) -> list[dict]:
    """Pages as a phone of 390 px lays them out, each in a frame: a window of Chromium's is never so narrow."""
    frames = "".join(
        f'<iframe style="border:0;width:390px;height:800px" srcdoc="{html.escape(source)}"></iframe>'
        for source in sources
    )
    script = """onload = () => document.title =
    JSON.stringify([...document.querySelectorAll("iframe")].map(({contentDocument: page}) => ({
        across: page.documentElement.scrollWidth, room: page.documentElement.clientWidth, background:
            getComputedStyle(page.body).backgroundColor,
        chart: page.querySelector("svg").getBoundingClientRect().width, tableScrolls: (box => box.scrollWidth >
            box.clientWidth)(page.querySelector(".scroll")),
        ink: getComputedStyle(page.querySelector("svg text")).fill})))"""
    (tmp_path / "frames.html").write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body>{frames}<script>{script}</script>', encoding="utf-8"
    )
    dom, _ = chromium(tmp_path, (tmp_path / "frames.html").as_uri(), *options)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))


@pytest.mark.slow
def test_opens_from_disk(tmp_path):
    written(tmp_path, *evaluation(["StyleGAN3", HOSTILE, "W" * 200]))
    dom, console = chromium(tmp_path, (tmp_path / "report.html").as_uri())
    assert console == ""
    assert "The most confident mistakes" in dom and "alert(1)" in dom and dom.count("<svg") == dom.count("</svg>") > 10
    # and a console that had something to say would be heard: the policy forbids what this asks for
    spoiled = (tmp_path / "report.html").read_text().replace("</body>", "<script>1</script></body>")
    (tmp_path / "spoiled.html").write_text(spoiled)
    assert "Content Security Policy" in chromium(tmp_path, (tmp_path / "spoiled.html").as_uri())[1]


@pytest.mark.slow
def test_fits_a_phone_and_follows_the_colour_scheme(tmp_path):
    long = [f"{letter * 60}" for letter in "WM"] + [f"Generator{i}" for i in range(4)]
    source, _ = written(tmp_path, *evaluation([*long, HOSTILE], warnings=["w" * 300]))
    too_wide = source.replace("</body>", '<div style="width: 700px">wide</div></body>')
    light, wide = measured(tmp_path, [source, too_wide], "--blink-settings=preferredColorScheme=1")
    assert wide["across"] >= 700  # what is too wide is seen
    assert light["across"] == light["room"] and 300 < light["chart"] <= 390 and light["tableScrolls"]
    (dark,) = measured(tmp_path, [source], "--blink-settings=preferredColorScheme=0")
    assert dark["across"] == dark["room"]
    assert light["background"] == "rgb(255, 255, 255)" and dark["background"] == "rgb(21, 24, 28)"
    assert light["ink"] == "rgb(27, 31, 36)" and dark["ink"] == "rgb(228, 232, 236)"
