"""evaluation/tables.py: columns stand under each other in any script, whatever a data set is called."""

import re

import numpy as np
import pytest
from wcwidth import wcswidth

from evaluation.metrics import METRIC_RANGE, METRICS
from evaluation.tables import (
    COLUMNS,
    HEADS,
    OPERATING,
    OPERATING_HEADS,
    generator_rows,
    operating_rows,
    print_results,
    results_as_latex,
)
from evaluation.typeset import as_markdown, as_text

NAMES = ("StyleGAN3", "扩散模型二号", "ディフュージョン", "Müller", "🙂", "a|b")


def results_of(names: tuple[str, ...]) -> dict[str, dict]:
    rng = np.random.default_rng(0)
    rows = {name: {metric: METRIC_RANGE.get(metric, 1) * rng.random() for metric in METRICS} for name in names}
    for name in names:
        rows[name] |= {"seen": name == names[0], "n_real": 40, "n_fake": 40}
        rows[name]["intervals"] = {metric: [0.0, top] for metric, top in METRIC_RANGE.items()}
    summary = {metric: float(np.mean([row[metric] for row in rows.values()])) for metric in METRICS}
    return rows | {"Mean": summary, "Std": summary, "Worst": {"generator": names[1], **summary}, "Run": {}}


def test_columns_stand_under_each_other_in_any_script(capsys):
    results = results_of(NAMES)
    print_results(results)
    tables = [table.splitlines() for table in capsys.readouterr().out.split("\n\n")]
    for lines, rows in zip(tables, (generator_rows(results), operating_rows(results)), strict=True):
        assert len(lines) == len(NAMES) + 4
        widths = {wcswidth(line) for line, row in zip(lines, [None, *rows]) if row is None or row[-1]}
        assert len(widths) == 1, "the last column is right-aligned: all rows that have it are equally wide"
        ends = {wcswidth(re.split("(?:un)?seen", line)[0]) for line in lines[1 : len(NAMES) + 1]}
        assert len(ends) == 1


def test_every_metric_is_a_column_and_every_column_a_metric():
    assert [column.metric for column in (*COLUMNS, *OPERATING)] == list(METRICS)
    for heads in (HEADS, OPERATING_HEADS, [column.title for column in (*COLUMNS, *OPERATING)]):
        assert len(set(heads)) == len(heads)


def test_markdown_is_a_table_of_text_and_numbers():
    head, rule, *rows = as_markdown(["generator", "AUC"], [[name, "0.5"] for name in NAMES]).splitlines()
    assert {line.replace(r"\|", "").count("|") for line in (head, rule, *rows)} == {3}
    left, right = rule.strip("|").split("|")
    assert set(left) == {":", "-"} and left[0] == ":" and right[-1] == ":" and right[0] == "-"
    assert rows[-1].startswith(r"| a\|b ")


def test_numbers_keep_their_digits():
    assert as_text(["a", "b"], [["1.50", "0.10"], ["1e5", "007"]]).split() == ["a", "b", "1.50", "0.10", "1e5", "007"]
    assert as_text(["a", "b"], []).split() == ["a", "b"]


@pytest.mark.parametrize("name", ["x\x1b[31mred", "tab\there", "\u202eturned", "zero\u200bwidth"])
def test_names_with_marks_are_one_line(name):
    results = results_of(("plain", name))
    assert len(results_as_latex(results).splitlines()) == 6 and len(generator_rows(results)) == 5
    assert len(as_text(["generator", "", *HEADS, "images"], generator_rows(results), left=2).splitlines()) == 6


def test_latex_rows_fit_one_tabular():
    lines = results_as_latex(results_of(NAMES)).splitlines()
    rows = [line for line in lines if line != r"\midrule"]
    assert len(lines) - len(rows) == 1 and lines[lines.index(r"\midrule") + 1].startswith("Mean")
    assert rows[0].startswith("% ") and {line.count("&") for line in rows} == {12}
    assert "log loss" not in rows[0] and "all in percent" in rows[0], "what is no percentage is left out"
    assert all(line.endswith(r" \\") for line in rows)
