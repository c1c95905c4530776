"""feature_extraction.py --manifest: the features of folders from a list; inference.py --by: errors by its columns."""

import csv
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import error_line, run_script

from evaluation.groups import NOT_SAID, in_order, in_parts, rate
from runtime.checkpoint import load_checkpoint
from samples.feature_files import SPLITS, open_features
from samples.manifest import read_manifest
from samples.splits import SplitError, deal_splits


def write(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def rows(datasets) -> list[dict]:
    """The images of `datasets`, in another order than folders have."""
    found = sorted(datasets.rglob("*.png"), key=lambda path: path.name[::-1])
    return [
        {
            "path": str(path.relative_to(datasets)),
            "label": path.relative_to(datasets).parts[0],
            "dataset": path.parent.name,
        }
        for path in found
    ]


def extract(manifest: Path, datasets: Path, output: Path, *options: object, expect: int = 0):
    arguments = ("--manifest", manifest, "--data_root", datasets, "--output_dir", output, "--workers", 1, *options)
    return run_script("feature_extraction.py", *arguments, cwd=manifest.parent, expect=expect)


def contents(folder: Path, split: str) -> dict[str, dict]:
    """{path: what a manifest says of it} of a split."""
    found = {}
    for path in folder.glob(f"*/*/{split}_features.h5"):
        with open_features(path) as file:
            about = (json.loads(text or "{}") for text in file["about"].asstr()[:])
            found |= dict(zip(file["paths"].asstr()[:], about))
    return found


@pytest.mark.slow
def test_a_list_gives_the_features_of_the_folders_it_was_written_from(datasets, features, rows, tmp_path):
    extract(write(tmp_path / "faces.csv", rows), datasets, tmp_path / "features")
    files = sorted(path.relative_to(features) for path in features.rglob("*.h5"))
    assert files == sorted(path.relative_to(tmp_path / "features") for path in (tmp_path / "features").rglob("*.h5"))
    for name in files:
        with h5py.File(features / name) as one, h5py.File(tmp_path / "features" / name) as two:
            assert one.keys() == two.keys()
            for key in one:
                np.testing.assert_array_equal(one[key][:], two[key][:], err_msg=f"{name} {key}")
    zeros_and_ones = [row | {"label": "01"[row["label"] == "fake"]} for row in rows]
    done = extract(write(tmp_path / "faces.csv", zeros_and_ones), datasets, tmp_path / "features")
    assert "up to date" in done.stdout


@pytest.mark.slow
def test_splits_groups_and_further_columns(datasets, features, rows, tmp_path):
    """Without an image being extracted again: what a list says changes nothing about them."""
    shutil.copytree(features, tmp_path / "features")
    for i, row in enumerate(rows):
        row["split"] = SPLITS[i % 3] if i < 30 else ""
        row["group"] = f"person {i // 10}" if 30 <= i < 90 else ""
        row["age"] = str(20 + i)
    done = extract(write(tmp_path / "faces.csv", rows), datasets, tmp_path / "features")
    assert f"going on: {len(rows)} of {len(rows)}" in done.stdout
    split_of = {path: split for split in SPLITS for path in contents(tmp_path / "features", split)}
    assert all(split_of[row["path"]] == row["split"] for row in rows[:30])
    for start in range(30, 90, 10):
        assert len({split_of[row["path"]] for row in rows[start : start + 10]}) == 1
    everything = {path: about for split in SPLITS for path, about in contents(tmp_path / "features", split).items()}
    assert everything == {row["path"]: {"age": row["age"]} for row in rows}

    rows[0]["age"] = "99"
    extract(write(tmp_path / "faces.csv", rows), datasets, tmp_path / "features")
    assert contents(tmp_path / "features", split_of[rows[0]["path"]])[rows[0]["path"]] == {"age": "99"}
    rows[1]["group"] = rows[0]["group"] = "one"
    line = error_line(extract(write(tmp_path / "faces.csv", rows), datasets, tmp_path / "features", expect=1))
    assert "faces.csv: " in line and "they must not be apart" in line and all(row["path"] in line for row in rows[:2])


@pytest.mark.slow
def test_labels_are_those_that_the_list_has_now(datasets, features, rows, tmp_path):
    shutil.copytree(features, tmp_path / "features")
    for row in rows:
        row["label"] = {"real": "fake", "fake": "real"}[row["label"]]
    extract(write(tmp_path / "faces.csv", rows), datasets, tmp_path / "features")
    for kind, name in (("fake", "Consistent"), ("real", "OffAxisMouth")):
        with open_features(tmp_path / f"features/{kind}/{name}/train_features.h5") as file:
            assert set(file["labels"][:]) == {int(kind == "fake")}


def test_rows_that_cannot_be_meant_are_named(datasets, rows, tmp_path):
    good = rows[:3]
    for change, message in (
        ({"label": "2"}, "line 3: the label is '2', it has to be real or fake, 0 or 1"),
        ({"path": "nowhere.png"}, f"line 3: {datasets / 'nowhere.png'}: no such file"),
        ({"path": rows[0]["path"]}, f"line 3: {rows[0]['path']} is there already, in line 2"),
        ({"path": " "}, "line 3: without a path"),
        ({"dataset": "a/b"}, "line 3: the data set 'a/b' cannot be the name of a folder"),
        ({"dataset": ""}, "line 3: the data set ''"),
        ({"dataset": "two\nlines"}, "line 4: the data set 'two\\nlines' cannot be the name of a folder"),
        ({"dataset": "n" * 256}, "line 3: the data set"),
        ({"path": rows[0]["path"] + "/below.png"}, f"line 3: {datasets / rows[0]['path']}/below.png: Not a directory"),
        ({"path": "n" * 300}, f"line 3: {datasets / ('n' * 300)}: File name too long"),
        ({"path": str(datasets / rows[0]["path"])}, "is there already, in line 2"),
        ({"path": "real/../" + rows[0]["path"]}, "is there already, in line 2"),
        ({"split": "dev"}, "line 3: the split is 'dev', it has to be train, val, test or empty"),
    ):
        changed = [dict(row, split="") for row in good]
        changed[1] |= change
        line = error_line(extract(write(tmp_path / "faces.csv", changed), datasets, tmp_path / "out", expect=1))
        assert f"faces.csv, {message}" in line or ("is there" in message and message in line), line
    for text, message in (
        ("", "has no column path, label, dataset"),
        ("path,label\na.png,0\n", "has no column dataset; its first line has to name path, label, dataset"),
        ("path,label,dataset\n", "lists no images"),
        ("path,label,dataset,age,age\n", "has two columns age"),
        ("path,label,dataset\na.png,0\n", "line 2: has more or fewer columns"),
        ("path,label,dataset\na.png,0,A,B\n", "line 2: has more or fewer columns"),
        ('path,label,dataset\n"a.png" x,0,A\n', "after line 1: not a table of comma-separated values"),
    ):
        (tmp_path / "faces.csv").write_text(text)
        assert message in error_line(extract(tmp_path / "faces.csv", datasets, tmp_path / "out", expect=1))
    (tmp_path / "faces.csv").write_bytes("path,label,dataset\na.png,0,Zürich\n".encode("latin-1"))
    line = error_line(extract(tmp_path / "faces.csv", datasets, tmp_path / "out", expect=1))
    assert "line 2: is not in UTF-8" in line
    write(tmp_path / "faces.csv", [good[0], good[0] | {"path": f"./{good[0]['path']}"}])
    line = error_line(extract(tmp_path / "faces.csv", datasets, tmp_path / "out", expect=1))
    assert "line 3: " in line and "is there already" in line
    options = ("--group_by_folder",)
    line = error_line(extract(tmp_path / "faces.csv", datasets, tmp_path / "out", *options, expect=1))
    assert "give the manifest a column group" in line
    line = error_line(extract(tmp_path / "no.csv", datasets, tmp_path / "out", expect=1))
    assert line == f"{tmp_path / 'no.csv'}: no such list"
    row = good[0] | {"split": "train"}
    options = ("--test_only", row["dataset"])
    line = error_line(extract(write(tmp_path / "faces.csv", [row]), datasets, tmp_path / "out", *options, expect=1))
    assert f"{row['path']} is for train, and --test_only names its data set" in line
    assert not list((tmp_path / "out").rglob("*.h5"))


def test_a_file_is_listed_once_whatever_its_spelling_and_links_lead_where_they_lead(tmp_path):
    for folder in ("root", "other/sub"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "../a.png").resolve().write_text(folder)
    (tmp_path / "root/a.png").write_text("root")
    (tmp_path / "root/link").symlink_to(tmp_path / "other/sub")
    header = " path, label,dataset,skin\n"
    paths = [str(tmp_path / "root/a.png"), "link/../a.png", "../a.png"]
    rows = [f"{path},0,A,{skin}\n" for path, skin in zip(paths, (" dark\tbrown ", "", "light"))]
    (tmp_path / "faces.csv").write_text(header + "".join(rows))
    sources = read_manifest(tmp_path / "faces.csv", tmp_path / "root")
    about = {source.path: json.loads(source.about)["skin"] for source in sources}
    assert about == {paths[0]: "dark brown", "link/../a.png": "", "../a.png": "light"}
    (tmp_path / "again").symlink_to(tmp_path / "root")
    for twice in ("a.png", "link/../../root/a.png", str(tmp_path / "again/a.png")):
        (tmp_path / "faces.csv").write_text(header + "".join(rows) + f"{twice},0,A,\n")
        with pytest.raises(ValueError, match=f"line 5: {twice} is there already, in line 2"):
            read_manifest(tmp_path / "faces.csv", tmp_path / "root")


def test_given_splits_are_obeyed_and_copies_follow():
    data_sets, contents = ["real/A"] * 10, [bytes([i]) for i in (0, 0, 2, 3, 4, 5, 6, 7, 8, 9)]
    given = ["val", *[""] * 8, "train"]
    splits = deal_splits(data_sets, contents, [None] * 10, seed=0, given=given)
    assert [SPLITS[splits[i]] for i in (0, 1, 9)] == ["val", "val", "train"]
    with pytest.raises(SplitError) as error:
        deal_splits(data_sets, contents, [None] * 10, seed=0, given=["val", "test", *given[2:]])
    assert error.value.by_split == {"val": 0, "test": 1}


# ------------------------------------------------------------------------------------------------------ errors by group


@pytest.mark.slow
def test_errors_by_column(datasets, features, rows, trained, tmp_path):
    shutil.copytree(features, tmp_path / "features")
    for i, row in enumerate(rows):
        row["tone"] = ("light", "dark", "")[i % 3]
    extract(write(tmp_path / "faces.csv", rows), datasets, tmp_path / "features")
    arguments = ("--features", tmp_path / "features", "--checkpoint", trained / "best_model.pth", "--bootstrap", 0)
    done = run_script("inference.py", *arguments, "--by", "tone", "dataset", cwd=tmp_path)
    by = json.loads((tmp_path / "prediction_results.json").read_text())["By"]
    assert list(by) == ["tone", "dataset"] and list(by["tone"]) == ["dark", "light", NOT_SAID]
    with open(tmp_path / "prediction_results.csv", newline="") as file:
        scored = {row["path"]: row for row in csv.DictReader(file)}
    tone_of = {row["path"]: row["tone"] for row in rows}
    real = [row for path, row in scored.items() if row["label"] == "0" and tone_of[path] == "dark"]
    dark = by["tone"]["dark"]
    assert dark["real"] == len(real) > 0
    threshold = load_checkpoint(trained / "best_model.pth")[1]["val_threshold"]
    assert dark["false_alarms"]["rate"] == pytest.approx(np.mean([float(row["score"]) >= threshold for row in real]))
    assert dark["false_alarms"]["low"] <= dark["false_alarms"]["rate"] <= dark["false_alarms"]["high"]
    assert by["dataset"]["fake/OffAxisMouth"]["real"] == 0 and by["dataset"]["fake/OffAxisMouth"]["missed"]
    assert by["dataset"]["fake/OffAxisMouth"]["false_alarms"] is by["dataset"]["fake/OffAxisMouth"]["auc"] is None
    assert "by tone" in done.stdout and "too few images to say much" in done.stdout
    assert "| by tone" in (tmp_path / "prediction_results.md").read_text()
    line = error_line(run_script("inference.py", *arguments, "--by", "hair", cwd=tmp_path, expect=1))
    assert "--by hair: no such column in these features; there are dataset, tone" in line


def test_many_numbers_are_cut_into_parts():
    ages = np.array([str(age) for age in range(1, 51)] + [NOT_SAID])
    parts = in_parts(ages)
    assert sorted(set(parts), key=in_order) == ["1 to 10", "11 to 20", "21 to 30", "31 to 40", "41 to 50", NOT_SAID]
    few = np.array(["1", "2", "10"] * 5)
    assert (in_parts(few) == few).all() and sorted(set(few), key=in_order) == ["1", "2", "10"]
    stamps = np.array([str(1_700_000_000_000_000_000 + 1000 * i) for i in range(50)])
    assert len(set(in_parts(stamps))) == 5 and in_parts(stamps)[0] == f"{stamps[0]} to {stamps[9]}"
    names = np.array(["a", "7"])
    assert (in_parts(names) == names).all()


def test_rates_have_wilsons_interval():
    found = rate(np.array([True, False, False, False]))
    assert found["rate"] == 0.25 and found["low"] == pytest.approx(0.0456, abs=1e-3) and found["high"] < 0.70
    assert rate(np.array([], bool)) is None
