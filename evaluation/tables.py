"""Results as tables: on the terminal, in Markdown for a page, in LaTeX for a paper. The columns are listed here."""

from typing import NamedTuple

from tabulate import LATEX_ESCAPE_RULES, SEPARATING_LINE, DataRow, Line, TableFormat

from evaluation.metrics import METRIC_RANGE
from evaluation.typeset import as_markdown, as_text, set_table


class Column(NamedTuple):
    """A metric as tables and report show it."""

    metric: str  # of METRIC_RANGE, by which it is in percent or in 0-1
    head: str  # in a table, beside the other columns
    title: str  # by itself
    meaning: str


COLUMNS = (
    Column("accuracy", "ACC %", "ACC %", "share of right verdicts at 0.5"),
    Column(
        "accuracy_val_threshold",
        "at val. threshold",
        "ACC % at val. threshold",
        "at the threshold that was chosen on validation",
    ),
    Column("real_accuracy", "real ACC %", "real ACC %", "of the real images alone, at 0.5"),
    Column("fake_accuracy", "fake ACC %", "fake ACC %", "of the fakes alone, at 0.5"),
    Column("ap", "AP", "AP", "average precision"),
    Column("auc", "AUC", "AUC", "area under the ROC curve: how often a fake gets a higher score than a real image"),
    Column("eer", "EER", "EER", "equal error rate, the lower the better"),
)
# In a table of their own
OPERATING = (
    Column(
        "tpr_at_fpr1",
        "TPR % at FPR 1 %",
        "TPR % at FPR 1 %",
        "share of fakes found where no more than 1 % of these real images are called fake",
    ),
    Column("tpr_at_fpr5", "at 5 %", "TPR % at FPR 5 %", "likewise at 5 %"),
    Column("tpr_at_fpr10", "at 10 %", "TPR % at FPR 10 %", "likewise at 10 %"),
    Column("ece", "ECE", "ECE", "expected calibration error, the lower the better"),
    Column("log_loss", "log loss", "log loss", "in nats, the lower the better; 0.693 is chance"),
)
IN_PERCENT = (*COLUMNS, *OPERATING[:3])  # for a paper
HEADS = tuple(column.head for column in COLUMNS)
OPERATING_HEADS = tuple(column.head for column in OPERATING)
# On the terminal and in Markdown; the JSON file and the report have all intervals
WITH_INTERVAL = ("ap", "auc", "tpr_at_fpr1", "tpr_at_fpr5")
LATEX_ROWS = TableFormat(
    lineabove=Line(r"\midrule", "", "", ""),  # what SEPARATING_LINE is drawn with
    linebelowheader=None,
    linebetweenrows=None,
    linebelow=None,
    headerrow=DataRow("% ", " & ", r" \\"),
    datarow=DataRow("", " & ", r" \\"),
    padding=0,
    with_header_hide=["lineabove"],
)


# ----------------------------------------------------------------------------------------------------- of an evaluation


def number(metric: str, value: float, fewer: int = 0) -> str:
    """A metric in its unit, or with some digits fewer."""
    return f"{value:.{(2 if METRIC_RANGE.get(metric) == 100 else 4) - fewer}f}"


def interval_of(row: dict, metric: str) -> str:
    """Such as [0.910, 0.951]; nothing where there is none."""
    between = (row.get("intervals") or {}).get(metric)
    return f"[{number(metric, between[0], 1)}, {number(metric, between[1], 1)}]" if between else ""


def cells(row: dict, columns: tuple[Column, ...] = COLUMNS) -> list[str]:
    """The numbers of a row, in the order of the columns."""
    values = []
    for metric, *_ in columns:
        between = interval_of(row, metric) if metric in WITH_INTERVAL else ""
        values.append(f"{number(metric, row[metric])} {between}".rstrip())
    return values


def title_of(name: str, row: dict) -> str:
    """A row's first cell, in one line whatever the data set is called."""
    return " ".join((f"Worst: {row['generator']}" if name == "Worst" else name).split())


def seen_or_not(row: dict) -> str:
    return {True: "seen", False: "unseen"}.get(row.get("seen"), "")


def count_of(row: dict) -> str:
    return str(row["n_real"] + row["n_fake"]) if "n_real" in row else ""


def generator_rows(results: dict[str, dict]) -> list[list[str]]:
    """A row for each generator and the summaries: name, seen or unseen, the numbers, images."""
    rows = [(name, row) for name, row in results.items() if name != "Run"]
    return [[title_of(name, row), seen_or_not(row), *cells(row), count_of(row)] for name, row in rows]


def operating_rows(results: dict[str, dict]) -> list[list[str]]:
    """The same rows in OPERATING."""
    rows = [(name, row) for name, row in results.items() if name != "Run"]
    return [[title_of(name, row), seen_or_not(row), *cells(row, OPERATING)] for name, row in rows]


def robustness_rows(rows: list[dict]) -> list[list[str]]:
    """A row for each corruption and level: the mean over generators."""
    return [[row["corruption"], f"{row['level']:g}", *cells(row["Mean"])] for row in rows]


def print_results(results: dict[str, dict]) -> None:
    print(as_text(["generator", "", *HEADS, "images"], generator_rows(results), left=2))
    print(f"\n{as_text(['generator', '', *OPERATING_HEADS], operating_rows(results), left=2)}")


def print_robustness(rows: list[dict]) -> None:
    print("\nmean over generators, under corruptions; --augment paper has shown training all of them but resize")
    print(as_text(["corruption", "level", *HEADS], robustness_rows(rows)))


def results_as_markdown(results: dict[str, dict], robustness: list[dict] | None) -> str:
    tables = [
        as_markdown(["generator", "in training", *HEADS, "images"], generator_rows(results), left=2),
        as_markdown(["generator", "in training", *OPERATING_HEADS], operating_rows(results), left=2),
    ]
    if robustness:
        tables.append(as_markdown(["corruption", "level", *HEADS], robustness_rows(robustness)))
    return "\n\n".join(tables) + "\n"


def results_as_latex(results: dict[str, dict]) -> str:
    """Rows for a tabular: generator, seen or unseen, IN_PERCENT, images."""
    spread, rows = results["Std"], []
    for name, row in results.items():
        if name in ("Run", "Std"):
            continue
        values = [f"{in_percent(row, column.metric):.1f}" for column in IN_PERCENT]
        if name == "Mean":
            spreads = [f"{in_percent(spread, column.metric):.1f}" for column in IN_PERCENT]
            values = [rf"{value} $\pm$ {deviation}" for value, deviation in zip(values, spreads)]
            rows.append(SEPARATING_LINE)
        title = "".join(LATEX_ESCAPE_RULES.get(letter, letter) for letter in title_of(name, row))
        rows.append([title, seen_or_not(row), *values, count_of(row)])
    heads = ["generator", "in training", *(column.title.replace(" %", "") for column in IN_PERCENT), "images"]
    heads[-2] += " (all in percent)"
    return set_table(heads, rows, 2, LATEX_ROWS) + "\n"


def in_percent(row: dict, metric: str) -> float:
    return row[metric] * 100 / METRIC_RANGE[metric]
