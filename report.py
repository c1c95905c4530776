"""Writes an evaluation as one HTML file: tables, curves, mistakes, settings. Called by inference.py --report.

    results, labels and scores, mistakes  ->  DIR/report.html

The file needs nothing but itself: no network, no script, no font. It is laid out for phone and desktop, light and dark, and paper.
Whatever comes from outside (names of files and data sets, settings) is escaped, and a Content-Security-Policy forbids scripts
should that ever fail.
"""

import base64
import html
import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import figures
from metrics import calibration

# key, head of its column, what it is; the first four are in percent, the others in 0-1
COLUMNS = (
    ("accuracy", "ACC %", "share of right verdicts at 0.5"),
    ("accuracy_val_threshold", "ACC % at val. threshold", "at the threshold that was chosen on validation"),
    ("real_accuracy", "real ACC %", "of the real images alone, at 0.5"),
    ("fake_accuracy", "fake ACC %", "of the fakes alone, at 0.5"),
    ("ap", "AP", "average precision"),
    ("auc", "AUC", "area under the ROC curve: how often a fake gets a higher score than a real image"),
    ("eer", "EER", "equal error rate, the lower the better"),
)
PERCENT = {key for key, _, _ in COLUMNS[:4]}
CURVES_A_CHART = len(figures.SERIES)  # then no colour comes twice in a chart
THUMBNAIL = 112  # pixels at most, of a mistake
CORRUPTIONS = {"jpeg": "JPEG", "blur": "Gaussian blur", "noise": "Gaussian noise", "resize": "Resize"}
STYLE_SHEET = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --soft: #5b6570; --line: #d9dee3; --panel: #f5f7f8; --warn: #9a5b00; --warn-page: #fff6e3; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #15181c; --text: #e4e8ec; --soft: #9aa5b1; --line: #343b43; --panel: #1d2126; --warn: #f0b95b; --warn-page: #2b2416; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.note { font-size: .85rem; line-height: 1.45; margin-top: .6rem; }
.soft, figcaption, caption, small { color: var(--soft); }
.glance { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.glance div { display: flex; flex-direction: column; background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; }
.glance dt { color: var(--soft); font-size: .85rem; }
.glance dd { margin: 0; }
.glance .big { font-size: 1.65rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
.warnings { background: var(--warn-page); border-left: 4px solid var(--warn); border-radius: .25rem; padding: .7rem 1rem; margin: 1.25rem 0; }
.warnings h2 { border: 0; margin: 0; padding: 0; font-size: 1rem; color: var(--warn); }
.warnings ul { margin: .25rem 0 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; caption-side: bottom; padding-top: .5rem; font-size: .85rem; }
th, td { padding: .4rem .65rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th { font-weight: 600; }
thead th { vertical-align: bottom; font-size: .85rem; }
tbody th, thead th:first-child { text-align: left; }
.results { width: 100%; }
.results th:first-child { position: sticky; left: 0; background: var(--page); }
.name { width: max-content; max-width: min(11rem, 38vw); overflow-wrap: anywhere; }
td small { display: block; font-size: .75rem; }
tfoot tr:first-child > * { border-top: 2px solid var(--text); }
tfoot th { text-align: left; }
.mark { display: inline-block; font-size: .72rem; font-weight: 400; line-height: 1.3; padding: 0 .4em; border: 1px solid var(--line); border-radius: 1em; color: var(--soft); white-space: nowrap; }
.mark.unseen { color: var(--text); border-color: currentColor; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19.5rem), 1fr)); gap: 1.25rem 1.5rem; align-items: start; }
.charts.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: .85rem; }
figcaption b, .keys b { color: var(--text); font-weight: 600; }
svg { display: block; width: 100%; height: auto; max-width: 28rem; }
svg * { stroke-linejoin: round; }
svg text { font-family: system-ui, sans-serif !important; }
.keys { list-style: none; margin: .5rem 0; padding: 0; font-size: .85rem; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); gap: .3rem 1rem; }
.keys li { display: grid; grid-template-columns: 2.2rem 1fr; gap: .5rem; align-items: start; }
.keys svg { width: 2.2rem; margin-top: .35rem; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1rem; }
.mistakes img { display: block; max-width: 100%; border-radius: .25rem; }
.mistakes figcaption { font-size: .75rem; line-height: 1.4; margin-top: .25rem; }
dl.settings { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1rem; margin: .5rem 0; font-size: .9rem; }
dl.settings dt { color: var(--soft); }
dl.settings dd { margin: 0; min-width: 0; font-variant-numeric: tabular-nums; }
details tbody th { white-space: nowrap; }
details { margin: .75rem 0; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem; }
summary { cursor: pointer; font-weight: 600; }
a { color: inherit; }
:focus-visible { outline: 2px solid #1f7fc4; outline-offset: 2px; }
@media print {
  :root { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  .results { font-size: 7.5pt; }
  .results thead th, .results small { font-size: .93em; }
  .results th, .results td { padding: .2rem .3rem; }
  .results th:first-child { position: static; }
  .charts { grid-template-columns: 1fr 1fr; }
  h2, h3 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Mistake(NamedTuple):
    """An image on the wrong side of the threshold."""

    image: np.ndarray  # (h, w, 3) uint8 RGB
    path: str  # below the data root, "fake/StyleGAN3/0001.png"
    label: int  # 0 real, 1 fake
    score: float  # probability of a fake


# ---------------------------------------------------------------------------------------------------------------- pieces


def printable(value: object) -> str:
    """What does not print, surrogates of odd file names and marks that turn the direction of writing among it, becomes an escape."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(value))


def text(value: object) -> str:
    """Anything as text of the page, between tags as well as in a quoted attribute."""
    return html.escape(printable(value), quote=True)


def number(key: str, value: float, fewer: int = 0) -> str:
    """A metric in its unit, as inference.py prints it, or with some digits fewer."""
    return f"{value:.{(2 if key in PERCENT else 4) - fewer}f}"


def interval_of(row: dict, key: str) -> str:
    """Such as [0.910, 0.951]; nothing where there is none."""
    between = (row.get("intervals") or {}).get(key)
    return f"[{number(key, between[0], 1)}, {number(key, between[1], 1)}]" if between else ""


def small(inner: str | None) -> str:
    """A second line in a cell."""
    return f"<small>{inner}</small>" if inner else ""


def seen_mark(row: dict) -> str:
    """Whether the generator was in training, as a mark; nothing where that is not known."""
    if row.get("seen") is None:
        return ""
    return '<span class="mark">seen in training</span>' if row["seen"] else '<span class="mark unseen">unseen</span>'


def described(value: object) -> str:
    """A setting, for people: lists with commas, dictionaries as key value, nothing as a dash."""
    if value is None or (isinstance(value, (dict, list, tuple)) and not value):
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{text(key)} {described(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(described, value))
    return text(f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 and float(f"{value:g}") == value else value)


def definitions(items: dict) -> str:
    return '<dl class="settings">' + "".join(f"<dt>{text(key)}</dt><dd>{described(value)}</dd>" for key, value in items.items()) + "</dl>"


def plot(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def key_line(style: dict) -> str:
    """A piece of a line, for a legend."""
    width, dashes = style["linewidth"], () if style["linestyle"] == "-" else style["linestyle"][1]
    lengths = " ".join(f"{length * width:g}" for length in dashes)
    colour = style["color"].replace(figures.INK, "currentColor")
    line = f'<path d="M0 5H36" fill="none" stroke="{colour}" stroke-width="{width + 0.7:g}" stroke-dasharray="{lengths or "none"}"/>'
    return f'<svg viewBox="0 0 36 10" aria-hidden="true">{line}</svg>'


def keys(entries: list[tuple[dict, str]]) -> str:
    """A legend of lines, beside the charts, where it may be as long as it likes. entries: (line style, HTML)."""
    return '<ul class="keys">' + "".join(f"<li>{key_line(style)}<span>{label}</span></li>" for style, label in entries) + "</ul>"


# -------------------------------------------------------------------------------------------------------------- sections


def heading(results: dict, generators: list[str]) -> str:
    mean, run = results["Mean"], results["Run"]
    unseen = [results[name].get("seen") for name in generators].count(False)
    count = f"{len(generators)} generator{'s' * (len(generators) > 1)}{f', {unseen} of them unseen in training' * (unseen > 0)}"
    tiles = [(f"Mean {head}", number(key, mean[key]), interval_of(mean, key)) for key, head in (("auc", "AUC"), ("ap", "AP"), ("accuracy", "ACC, %"))]
    worst = results["Worst"]
    tiles.append(("Worst generator, AUC", number("auc", worst["auc"]), text(worst["generator"])))
    boxes = "".join(f'<div><dt>{title}</dt><dd class="big">{value}</dd><dd class="soft">{below or "&nbsp;"}</dd></div>' for title, value, below in tiles)
    between = " Square brackets hold 95 % intervals." if mean.get("intervals") else ""
    return (
        f"<header><h1>LAMM-ViT: real or fake?</h1><p class=\"soft\">{text(run['checkpoint'])}, against {count}, "
        f"{text(run['split'])} split, protocol {text(run['protocol'])}.{between}</p><dl class=\"glance\">{boxes}</dl></header>"
    )


def warnings_box(warnings: list[str]) -> str:
    if not warnings:
        return ""
    return '<section class="warnings"><h2>Before you trust these numbers</h2><ul>' + "".join(f"<li>{text(line)}</li>" for line in warnings) + "</ul></section>"


def results_table(results: dict, generators: list[str]) -> str:
    def row(title: str, values: dict, images: str = "", spread: dict | None = None) -> str:
        cells = [f"<td>{number(key, values[key])}{small(spread and f'± {number(key, spread[key], 1)}')}{small(interval_of(values, key))}</td>" for key, _, _ in COLUMNS]
        return f'<tr><th scope="row"><div class="name">{title}</div></th>{"".join(cells)}<td>{images}</td></tr>'

    body = [row(f"{text(name)}<br>{seen_mark(results[name])}", results[name], f"{results[name]['n_real']:,} real<br>{results[name]['n_fake']:,} fake") for name in generators]
    several = len(generators) > 1
    foot = row("Mean ± std" if several else "Mean", results["Mean"], spread=results["Std"] if several else None) + row(f"Worst: {text(results['Worst']['generator'])}", results["Worst"])
    head = "".join(f'<th scope="col">{title.replace(" %", "&nbsp;%").replace("real ", "real&nbsp;").replace("fake ", "fake&nbsp;")}</th>' for title in ("generator", *(title for _, title, _ in COLUMNS), "images"))
    meaning = "; ".join(f"{title.replace(' %', '')}: {what}" for _, title, what in COLUMNS)
    return (
        '<section><h2>Results</h2><div class="scroll" tabindex="0" role="region" aria-label="Results by generator">'
        f'<table class="results"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody><tfoot>{foot}</tfoot></table></div>'
        f'<p class="soft note">{meaning}. Each generator’s fakes stand against as many real images. Std is over generators; worst is the lowest AUC.</p></section>'
    )


def curves(results: dict, comparisons: dict) -> str:
    """ROC and precision-recall; with many generators several pairs of charts, of a few each."""
    names, parts = list(comparisons), []
    for first in range(0, len(names), CURVES_A_CHART):
        group = names[first : first + CURVES_A_CHART]
        roc, pr = figures.roc_and_pr_charts([comparisons[name] for name in group], first)
        listed = ", ".join(group)
        parts += [
            plot(figures.as_svg(roc, f"roc{first}", f"ROC curves of {printable(listed)}"), "<b>ROC.</b> The closer to the upper left corner the better; dotted is chance."),
            plot(
                figures.as_svg(pr, f"pr{first}", f"Precision-recall curves of {printable(listed)}"),
                "<b>Precision and recall.</b> The closer to the upper right corner the better; dotted is chance.",
            ),
            keys([(figures.line_style(i), f"<b>{text(name)}</b><br>AUC {number('auc', results[name]['auc'])}, AP {number('ap', results[name]['ap'])}") for i, name in enumerate(group, first)]),
        ]
    return f'<section><h2>ROC and precision-recall curves</h2><div class="charts">{"".join(parts)}</div></section>'


def histograms(results: dict, comparisons: dict) -> str:
    threshold = results["Run"]["val_threshold"]
    top = max(figures.count_scores(scores[labels == label]).max() for labels, scores in comparisons.values() for label in (0, 1))
    parts = []
    for i, (name, (labels, scores)) in enumerate(comparisons.items()):
        chart = figures.score_histogram(labels, scores, threshold, top)
        svg = figures.as_svg(chart, f"scores{i}", f"Histogram of the scores of real images and of {printable(name)}")
        row = results[name]
        right = f"{row['real_accuracy']:.1f} % of the real images, {row['fake_accuracy']:.1f} % of the fakes"
        parts.append(plot(svg, f"<b>{text(name)}.</b> At 0.5 right: {right}."))
    return (
        "<section><h2>Scores</h2><p>Real images belong to the left, fakes to the right; what lies on the other side of a vertical line is a mistake at that threshold. "
        f'The count is logarithmic, so that the few in the middle are seen beside the many at the ends.</p><div class="charts">{"".join(parts)}</div></section>'
    )


def reliability(comparisons: dict) -> str:
    labels, scores = (np.concatenate(parts) for parts in zip(*comparisons.values()))
    mean_score, fake_fraction, counts, error = calibration(labels, scores)
    svg = figures.as_svg(figures.reliability_chart(mean_score, fake_fraction, counts), "reliability", f"Reliability diagram, expected calibration error {error:.4f}")
    caption = "Below the diagonal the model says “fake” too surely, above it not surely enough; small groups of images (lower chart) wander by chance."
    return (
        f'<section><h2>Calibration</h2><div class="charts">{plot(svg, caption)}'
        f"<div><p>Expected calibration error <b>{error:.4f}</b>: so far, on average, is a score from the share of fakes among images of such scores. "
        "All comparisons together; a real image that stands against several generators counts in each.</p>"
        '<p class="soft">Real and fake images are equally many here. Where fakes are rare, the same score means a smaller probability.</p></div></div></section>'
    )


def robustness_section(rows: list[dict] | None) -> str:
    if not rows:
        return ""
    names = figures.generators_of(rows)
    parts = []
    for corruption, chart in figures.robustness_charts(rows).items():
        title = text(CORRUPTIONS.get(corruption, corruption))
        label = f"AUC under {printable(CORRUPTIONS.get(corruption, corruption))}, by level, for each generator and in the mean"
        parts.append(plot(figures.as_svg(chart, f"robust{len(parts)}", label), f"<b>{title}.</b> Left the clean images; the harder a line falls, the less the model withstands."))
    legend = keys([(figures.MEAN_STYLE, "<b>mean</b>"), *((figures.line_style(i), text(name)) for i, name in enumerate(names))])
    columns = [column for column in COLUMNS if column[0] in rows[0]["Mean"]]
    head = "".join(f'<th scope="col">{title}</th>' for title in ("corruption", "level", *(title for _, title, _ in columns)))
    body = ""
    for row in rows:
        clean = row["corruption"] == "none"
        cells = ["" if clean else f"{row['level']:g}", *(number(key, row["Mean"][key]) for key, _, _ in columns)]
        title = "clean" if clean else CORRUPTIONS.get(row["corruption"], row["corruption"])
        body += f'<tr><th scope="row">{text(title)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    return (
        "<section><h2>Robustness</h2><p>The same images, made worse before the model sees them. All charts have one vertical axis; dotted is chance.</p>"
        f'{legend}<div class="charts wide">{"".join(parts)}</div><details><summary>Mean over generators, in numbers</summary>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Robustness in numbers"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details></section>'
    )


def thumbnail(mistake: Mistake) -> str:
    image = Image.fromarray(mistake.image)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    truth = "fake" if mistake.label else "real"
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" width="{image.width}" height="{image.height}" alt="A {truth} image, score {mistake.score:.4f}">'
        f"<figcaption>{text(mistake.path)}<br>truth <b>{truth}</b>, score <b>{mistake.score:.4f}</b></figcaption></figure>"
    )


def mistakes_section(mistakes: list[Mistake], threshold: float) -> str:
    parts = []
    for label, title in ((0, "Real images called fake"), (1, "Fakes called real")):
        shown = "".join(thumbnail(mistake) for mistake in mistakes if mistake.label == label)
        parts.append(f"<h3>{title}</h3>" + (f'<div class="mistakes">{shown}</div>' if shown else "<p>None.</p>"))
    return (
        f"<section><h2>The most confident mistakes</h2><p>Those furthest on the wrong side of the validation threshold, {threshold:.4g}. "
        f"The score is the probability of a fake.</p>{''.join(parts)}</section>"
    )


def settings(run: dict) -> str:
    """Everything in Run, known or not, but the warnings, which stand above."""
    first = {"checkpoint": "Checkpoint", "checkpoint_sha256": "SHA-256", "split": "Split", "protocol": "Protocol", "val_threshold": "Validation threshold"}
    first |= {"datasets_trained": "Trained on", "versions": "Versions"}
    folded = {"arguments": "Arguments of this evaluation", "train_arguments": "Arguments of the training", "sources": "What the images were before preprocessing"}
    rest = {key: value for key, value in run.items() if key not in first and key not in folded and key != "warnings"}
    parts = [definitions({title: run[key] for key, title in first.items() if key in run} | rest)]
    parts += [f"<details><summary>{title}</summary>{definitions(run[key]) if isinstance(run[key], dict) else described(run[key])}</details>" for key, title in folded.items() if run.get(key)]
    return f"<section><h2>Settings</h2>{''.join(parts)}</section>"


# ------------------------------------------------------------------------------------------------------------------ page


def write_report(
    path: Path, results: dict, comparisons: dict[str, tuple[np.ndarray, np.ndarray]], mistakes: list[Mistake], robustness: list[dict] | None
) -> None:
    """Writes the HTML file; an earlier one is replaced only by a whole one. The same input gives the same bytes.

    Args:
        path: of the file; its folder exists.
        results: as in prediction_results.json: metrics (and "intervals", if there are any) of each generator, "Mean", "Std",
            "Worst", and how they came about under "Run".
        comparisons: {generator: (labels (N,) 1 = fake, scores (N,) probability of a fake)}, real and fake in equal numbers.
        mistakes: in the order in which they are shown.
        robustness: rows of inference.py --robustness, or None.
    """
    generators, run = list(comparisons), results["Run"]
    sections = [
        heading(results, generators),
        warnings_box(run.get("warnings") or []),
        results_table(results, generators),
        curves(results, comparisons),
        histograms(results, comparisons),
        reliability(comparisons),
        robustness_section(robustness),
        mistakes_section(mistakes, run["val_threshold"]),
        settings(run),
    ]
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>LAMM-ViT: {text(run['checkpoint'])}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n" + "\n".join(filter(None, sections)) + "\n</body>\n</html>\n"
    )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
