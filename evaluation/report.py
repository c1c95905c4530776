"""Writes an evaluation as one HTML file: tables, curves, mistakes, settings. Called by inference.py --report.

    results, labels and scores, mistakes  ->  DIR/report.html

The page is the Jinja template report.html beside this file, its style report.css. What is written needs nothing but
itself: no network, no script, no font. It is laid out for phone and desktop, light and dark, and paper. Whatever comes
from outside (names of files and data sets, settings) is escaped, and a Content-Security-Policy forbids scripts should
that ever fail.
"""

import base64
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from evaluation import figures
from evaluation.groups import threshold_tables
from evaluation.metrics import calibration
from evaluation.mistakes import Mistake
from evaluation.operating import describe_thresholds, verdict_of, why_apart
from evaluation.tables import COLUMNS, OPERATING, interval_of, number
from runtime.files import replacing

CURVES_A_CHART = len(figures.SERIES)  # then no colour comes twice in a chart
THUMBNAIL = 112  # pixels at most, of a mistake
CORRUPTIONS = {"jpeg": "JPEG", "blur": "Gaussian blur", "noise": "Gaussian noise", "resize": "Resize"}
FOLDER = Path(__file__).parent
STYLE_SHEET = (FOLDER / "report.css").read_text(encoding="utf-8")
# Settings by the keys of Run: those that come first, and those that are folded away; any other stands between them.
FIRST_SETTINGS = {
    "checkpoint": "Checkpoint",
    "checkpoint_sha256": "SHA-256",
    "split": "Split",
    "protocol": "Protocol",
    "val_threshold": "Validation threshold",
    "temperature": "Temperature",
    "datasets_trained": "Trained on",
    "versions": "Versions",
}
FOLDED_SETTINGS = {
    "arguments": "Arguments of this evaluation",
    "train_arguments": "Arguments of the training",
    "sources": "What the images were before preprocessing",
}


# --------------------------------------------------------------------------------------------------------------- pieces


def printable(value: object) -> str:
    """What does not print becomes an escape: surrogates of odd file names, and marks that turn the way of writing."""
    letters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    return "".join(letters)


def finalize(value: object) -> object:
    """What each expression of the template goes through before it is escaped."""
    return value if isinstance(value, Markup) else printable(value)


def short(value: object) -> object:
    """A setting, for people: numbers with as few digits as tell them."""
    is_short = isinstance(value, float) and abs(value) < 1e6 and float(f"{value:g}") == value
    return f"{value:g}" if is_short else value


def unbroken(title: str) -> Markup:
    """The head of a column of ours, with spaces at which no line breaks."""
    for piece in (" %", "real ", "fake "):
        title = title.replace(piece, piece.replace(" ", "&nbsp;"))
    return Markup(title)


def key_line(style: dict) -> Markup:
    """A piece of a line, for a legend."""
    width, dashes = style["linewidth"], () if style["linestyle"] == "-" else style["linestyle"][1]
    lengths = " ".join(f"{length * width:g}" for length in dashes)
    colour = style["color"].replace(figures.INK, "currentColor")
    line = '<path d="M0 5H36" fill="none" stroke="{}" stroke-width="{}" stroke-dasharray="{}"/>'
    line = Markup(line).format(colour, f"{width + 0.7:g}", lengths or "none")
    return Markup('<svg viewBox="0 0 36 10" aria-hidden="true">{}</svg>').format(line)


def svg_of(chart: Any, name: str, label: str) -> Markup:
    """A chart; what is read aloud in its place."""
    return Markup(figures.as_svg(chart, name, printable(label)))


class Picture(NamedTuple):
    width: int
    height: int
    data: str  # JPEG in base64


def thumbnail(mistake: Mistake) -> Picture:
    image = Image.fromarray(mistake.image)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return Picture(image.width, image.height, base64.b64encode(file.getvalue()).decode("ascii"))


# ------------------------------------------------------------------------------------------------------------- sections


def curves(comparisons: dict) -> list[dict]:
    """ROC and precision-recall; with many generators several pairs of charts, of a few each."""
    names, groups = list(comparisons), []
    for first in range(0, len(names), CURVES_A_CHART):
        group = names[first : first + CURVES_A_CHART]
        roc, precision_recall = figures.roc_and_pr_charts([comparisons[name] for name in group], first)
        listed = ", ".join(group)
        groups.append(
            {
                "roc": svg_of(roc, f"roc{first}", f"ROC curves of {listed}"),
                "precision_recall": svg_of(precision_recall, f"pr{first}", f"Precision-recall curves of {listed}"),
                "lines": [(figures.line_style(i), name) for i, name in enumerate(group, first)],
            }
        )
    return groups


def histograms(comparisons: dict, threshold: float) -> list[tuple[str, Markup]]:
    of_class = [scores[labels == label] for labels, scores in comparisons.values() for label in (0, 1)]
    top = max(figures.count_scores(scores).max() for scores in of_class)
    charts = []
    for i, (name, (labels, scores)) in enumerate(comparisons.items()):
        chart = figures.score_histogram(labels, scores, threshold, top)
        charts.append((name, svg_of(chart, f"scores{i}", f"Histogram of the scores of real images and of {name}")))
    return charts


def reliability(comparisons: dict) -> tuple[Markup, float]:
    """The diagram, and the expected calibration error."""
    labels, scores = (np.concatenate(parts) for parts in zip(*comparisons.values()))
    mean_score, fake_fraction, counts, error = calibration(labels, scores)
    chart = figures.reliability_chart(mean_score, fake_fraction, counts)
    return svg_of(chart, "reliability", f"Reliability diagram, expected calibration error {error:.4f}"), error


def robustness_of(rows: list[dict] | None) -> dict | None:
    if not rows:
        return None
    charts, table = [], []
    for corruption, chart in figures.robustness_charts(rows).items():
        title = CORRUPTIONS.get(corruption, corruption)
        label = f"AUC under {title}, by level, for each generator and in the mean"
        charts.append((title, svg_of(chart, f"robust{len(charts)}", label)))
    for row in rows:
        is_clean = row["corruption"] == "none"
        title = "clean" if is_clean else CORRUPTIONS.get(row["corruption"], row["corruption"])
        table.append((title, "" if is_clean else f"{row['level']:g}", row["Mean"]))
    lines = [(figures.line_style(i), name) for i, name in enumerate(figures.generators_of(rows))]
    return {"charts": charts, "rows": table, "lines": lines}


def settings_of(run: dict) -> tuple[dict, dict]:
    """Everything in Run but the warnings, which stand above: what is seen at once, and what is folded."""
    seen = {title: run[key] for key, title in FIRST_SETTINGS.items() if key in run}
    known = {*FIRST_SETTINGS, *FOLDED_SETTINGS, "warnings", "threshold"}
    seen |= {key: value for key, value in run.items() if key not in known}
    return seen, {title: run[key] for key, title in FOLDED_SETTINGS.items() if run.get(key)}


def in_two_groups(mistakes: list[Mistake]) -> list[tuple[str, str, list]]:
    groups = []
    for label, truth, title in ((0, "real", "Real images called fake"), (1, "fake", "Fakes called real")):
        shown = [(mistake, thumbnail(mistake)) for mistake in mistakes if mistake.label == label]
        groups.append((truth, title, shown))
    return groups


# ----------------------------------------------------------------------------------------------------------------- page


def write_report(
    path: Path,
    results: dict,
    comparisons: dict[str, tuple[np.ndarray, np.ndarray]],
    mistakes: list[Mistake],
    robustness: list[dict] | None,
    operating: dict,
) -> None:
    """Writes the HTML file; an earlier one is replaced only by a whole one. The same input gives the same bytes.

    Args:
        path: of the file; its folder exists.
        results: as in prediction_results.json: metrics (and "intervals", if there are any) of each generator, "Mean",
            "Std", "Worst", and how they came about under "Run".
        comparisons: {generator: (labels (N,) 1 = fake, scores (N,) probability of a fake)}, as many real as fake.
        mistakes: in the order in which they are shown.
        robustness: rows of inference.py --robustness, or None.
        operating: of groups.at_thresholds.
    """
    run, generators = results["Run"], {name: results[name] for name in comparisons}
    thresholds = operating["thresholds"]
    diagram, error = reliability(comparisons)
    seen, folded = settings_of(run)
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        columns=COLUMNS,
        operating_columns=OPERATING,
        threshold_tables=threshold_tables(operating),
        verdicts=describe_thresholds(thresholds),
        why_apart=why_apart(thresholds),
        verdict_of=lambda score: verdict_of(score, thresholds),
        number=number,
        interval_of=interval_of,
        short=short,
        key_line=key_line,
        style_sheet=Markup(STYLE_SHEET),
        run={"warnings": []} | run,
        generators=generators,
        unseen=[row.get("seen") for row in generators.values()].count(False),
        mean={"intervals": None} | results["Mean"],
        std=results["Std"],
        worst=results["Worst"],
        unbroken_titles=[unbroken(column.title) for column in COLUMNS],
        operating_titles=[unbroken(column.title) for column in OPERATING],
        curves=curves(comparisons),
        histograms=histograms(comparisons, run["val_threshold"]),
        reliability=diagram,
        calibration_error=error,
        robustness=robustness_of(robustness),
        mean_style=figures.MEAN_STYLE,
        mistakes=in_two_groups(mistakes),
        settings=seen,
        folded_settings=folded,
    )
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
