"""benchmarks/unseen.py: folds of data sets that are left out, how they are judged, the whole command on drawn faces."""

import contextlib
import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.special import expit
from sklearn.metrics import roc_auc_score

import feature_extraction
import preprocess
import train
from benchmarks import unseen
from benchmarks.comparison import detectors, images, near_duplicates
from benchmarks.comparison.detectors import SHORTCUTS, read_others
from benchmarks.comparison.folds import FOLDS, Fold, Stock, check_images, load_stock, read_folds
from benchmarks.comparison.frozen import PROBES, build_trunk, read_blocks
from benchmarks.comparison.judge import alike, difference, judge, mean_of_folds, paired, pooled_ece
from dataset import FaceDataset
from drawing.render import draw_face
from evaluation.masks import OWN, WRONG
from evaluation.scoring import predict_scores
from runtime.checkpoint import load_checkpoint
from training.options import get_args_parser as train_parser

# ----------------------------------------------------------------------------------------------------------- the folds


def test_our_folds_leave_out_every_data_set_once_and_families_whole():
    kinds = json.loads(FOLDS.read_text())
    named = [
        f"{kind}/{name}"
        for of in kinds["new families"].values()
        for kind, key in (("fake", "fakes"), ("real", "photographs"))
        for name in of[key]
    ]
    folds = read_folds(FOLDS, named)
    assert len(named) == len(set(named)) == 27
    kinds = ["new families"] * 6 + ["new sources"] * 8 + ["further new sources"] * 7
    assert [fold.kind for fold in folds] == kinds
    once = [fold.fakes[0] for fold in folds[6:]]
    several = [one for fold in folds[:6] if len(fold.fakes) > 1 for one in fold.fakes]
    assert sorted(once) == sorted(several), "each source of a family with several is a new one once"
    families = [set(fold.fakes) for fold in folds[:6]]
    for fold in folds[6:]:
        family = next(family for family in families if set(fold.fakes) <= family)
        known = [set(of) - set(fold.fakes) for of in families]
        assert (
            len(fold.fakes) == len(fold.photographs) == 1
            and family - set(fold.fakes) in known
            and family > set(fold.fakes)
        ), "training knows others of its family"


THERE = ["real/A", "real/B", "fake/X", "fake/Y"]


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        (
            {"k": {"f": {"fakes": ["X", "Z"], "photographs": ["A"]}}},
            "k, f: no data set fake/Z; there are fake/X, fake/Y",
        ),
        (
            {"k": {"f": {"fakes": ["X"], "photographs": []}}},
            "k, f: leaves out fake/X; fakes and photographs are needed",
        ),
        ({"k": {"f": {"fakes": ["X", "X"], "photographs": ["A"]}}}, "k, f: fake/X is left out by f, too"),
        (
            {"k": {"f": {"fakes": ["X"], "photographs": ["A"]}, "g": {"fakes": ["Y"], "photographs": ["A"]}}},
            "k, g: real/A is left out by f, too",
        ),
        ({"k": {"f": {"fakes": ["X", "Y"], "photographs": ["A"]}}}, "k, f: leaves no fake data set to train on"),
        ({"k": {"f": {"fakes": ["X"], "photographs": ["A", "B"]}}}, "k, f: leaves no real data set to train on"),
        ({"k": {"f": {"fakes": ["X"]}}}, r"not of the form .*KeyError\('photographs'\)"),
        ({"k": ["f"]}, "not of the form"),
        ({"about": "nothing"}, "no fold in it"),
    ],
)
def test_folds_that_cannot_be(tmp_path, folds, message):
    (tmp_path / "folds.json").write_text(json.dumps(folds))
    with pytest.raises(ValueError, match=message) as error:
        read_folds(tmp_path / "folds.json", THERE)
    assert "\n" not in str(error.value)


def test_a_file_of_folds_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_folds(tmp_path / "folds.json", THERE)
    (tmp_path / "folds.json").write_text("{")
    with pytest.raises(ValueError, match="not of the form"):
        read_folds(tmp_path / "folds.json", THERE)


def test_a_data_set_may_be_left_out_by_folds_of_two_kinds_and_other_data_sets_are_another_fold(tmp_path):
    one = {"fakes": ["X"], "photographs": ["A"]}
    (tmp_path / "folds.json").write_text(json.dumps({"k": {"f": one}, "l": {"f": one}}))
    folds = read_folds(tmp_path / "folds.json", THERE)
    assert [fold.left_out for fold in folds] == [("real/A", "fake/X")] * 2
    assert len({fold.folder for fold in (*folds, folds[0]._replace(fakes=("fake/Y",)))}) == 3


def test_a_data_set_in_two_roots(tmp_path):
    for root in ("one", "two"):
        (tmp_path / root / "real/A").mkdir(parents=True)
    (tmp_path / "two/fake/A").mkdir(parents=True)
    assert list(images.data_sets_of(tmp_path / "two")) == ["real/A", "fake/A"]
    with pytest.raises(ValueError, match=f"two/real/A: real/A is in {tmp_path}/one, too"):
        images.data_sets_of(tmp_path / "one", tmp_path / "two")


# -------------------------------------------------------------------------------------------------------------- judging


def stock_of(*parts: tuple[str, int, int]) -> Stock:
    """A stock of made images: (data set, split, how many) of each part."""
    names = np.array([name for name, _, count in parts for _ in range(count)])
    splits = np.array([split for _, split, count in parts for _ in range(count)])
    labels = np.array([name.startswith("fake/") for name in names]).astype(np.uint8)
    paths = np.array([f"{name}/{i}.png" for i, name in enumerate(names)])
    return Stock({name: [] for name in dict.fromkeys(names)}, names, splits, labels, paths, 96, "made")


FOLD = Fold("kind", "fold", ("fake/X", "fake/Y"), ("real/A", "real/B"))
PARTS = (
    *(("real/A", 0, 2), ("real/B", 2, 1), ("fake/X", 1, 2), ("fake/Y", 2, 1)),  # left out
    *(("real/C", 1, 3), ("fake/Z", 1, 3), ("real/C", 2, 2), ("real/C", 0, 4), ("fake/Z", 2, 4)),
)
#                    A       B   X       Y
LEFT_OUT = np.array([-2, 0.5, 3, -1, 2, 1.0])
VAL_REAL, VAL_FAKE = [-3, -2, 0], [-1, 2, 3]


def made_scores(stock: Stock) -> np.ndarray:
    unused = np.full(10, np.nan)
    return np.r_[LEFT_OUT, VAL_REAL, VAL_FAKE, unused][None]


def test_which_images_a_fold_needs():
    stock = stock_of(*PARTS)
    assert stock.of(FOLD.photographs).tolist() == [0, 1, 2] and stock.of(FOLD.fakes).tolist() == [3, 4, 5]
    assert stock.known(FOLD, 1).tolist() == [6, 7, 8, 9, 10, 11] and stock.known(FOLD, 1, 0).tolist() == [6, 7, 8]
    assert stock.needed(FOLD).tolist() == list(range(12)) and stock.known_names(FOLD) == ["real/C", "fake/Z"]


def test_a_fold_by_hand():
    stock = stock_of(*PARTS)
    judged = judge(stock, FOLD, made_scores(stock))
    # fakes -1, 2 and 1 against photographs -2, 0.5 and 3
    pairs = {"X | A": (1 + 0 + 1 + 1) / 4, "X | B": 0, "Y | A": 1, "Y | B": 0}
    assert judged.pairs == pytest.approx(pairs) and judged.auc == [pytest.approx(np.mean(list(pairs.values())))]
    assert judged.auc[0] != pytest.approx(roc_auc_score([0, 0, 0, 1, 1, 1], LEFT_OUT)), "small collections count alike"
    assert judged.known == [pytest.approx((5 / 6 + 1) / 2)], "against -3, -2 and 0 of validation"
    # three photographs bound neither rate: the threshold is half way from the highest of them to 1
    scores, highest = expit(LEFT_OUT / judged.temperatures[0]), expit(0)
    assert judged.thresholds == [{"0.01": pytest.approx((highest + 1) / 2), "0.05": pytest.approx((highest + 1) / 2)}]
    for name, shares, mine in (
        ("real/A", judged.alarms, scores[:2]),
        ("real/B", judged.alarms, scores[2:3]),
        ("fake/X", judged.found, scores[3:5]),
    ):
        assert shares[name]["0.01"] == [np.mean(mine >= 0.75)]
    right = np.where(stock.labels[:6] == 1, scores, 1 - scores)
    weights = np.array([1, 1, 2, 1, 1, 2]) / 8  # A, A, B, X, X, Y: each data set as much as the other of its class
    assert judged.log_loss == [pytest.approx(-(weights @ np.log(right)))]
    assert len(judged.ece) == 1 and 0 < judged.ece[0] < 1 and judged.size == 1
    low, high = judged.interval
    assert low <= judged.auc[0] <= high


def test_classes_weigh_alike_in_calibration():
    parts = (("real/A", 0, 30), ("real/B", 0, 1), ("fake/X", 0, 4), ("fake/Y", 0, 6), *PARTS[4:])
    stock = stock_of(*parts)
    scores = made_scores(stock_of(*PARTS))[:, 6:]
    judged = judge(stock, FOLD, np.c_[np.full((1, 31), -1.0), np.full((1, 10), 2.0), scores])
    temperature = judged.temperatures[0]
    loss = (np.logaddexp(0, -1 / temperature) + np.logaddexp(0, -2 / temperature)) / 2
    assert judged.log_loss == [pytest.approx(loss)]
    assert judged.ece == [pytest.approx((expit(-1 / temperature) + expit(-2 / temperature)) / 2)]
    assert judged.auc == [pytest.approx(1)] and judged.interval[1] == 1 and judged.interval[0] < 1


def test_calibration_of_all_folds_together():
    """In one fold all log odds are too high by 2, in the other too low by 2: each alone is wrong, together they are
    less so."""
    parts = [(name, split, 400) for name in ("real/A", "real/B", "fake/X", "fake/Y") for split in (0, 1, 2)]
    stock = stock_of(*parts)
    folds = [Fold("sources", one[-1], (f"fake/{one[1]}",), (f"real/{one[0]}",)) for one in ("AX", "BY")]
    rng = np.random.default_rng(0)
    true = 2 * (rng.normal(size=len(stock.labels)) + 2 * (stock.labels - 0.5))  # each log odds is right
    log_odds = {fold: (true + shift)[None] for fold, shift in zip(folds, (2, -2))}
    judged = {fold: judge(stock, fold, rows)._replace(temperatures=[1.0]) for fold, rows in log_odds.items()}
    assert pooled_ece(stock, {folds[0]: true[None]}, judged) == [pytest.approx(0, abs=0.03)]
    alone = [pooled_ece(stock, {fold: log_odds[fold]}, judged)[0] for fold in folds]
    assert min(alone) > 0.2 and pooled_ece(stock, log_odds, judged)[0] < 0.12


def test_bootstrap_is_that_of_delong_where_both_fit():
    rng = np.random.default_rng(0)
    fold = Fold("kind", "fold", ("fake/X",), ("real/A",))
    stock = stock_of(("real/A", 0, 120), ("fake/X", 0, 90), *PARTS[4:])
    rest = made_scores(stock_of(*PARTS))[:, 6:]
    signal = np.r_[np.zeros(120), np.ones(90)] + rng.normal(size=210)
    first, second = (
        np.stack([np.r_[signal + noise * rng.normal(size=210), rest[0]] for _ in range(2)]) for noise in (0.3, 1.0)
    )
    one, other = judge(stock, fold, first), judge(stock, fold, second)
    gain, exact = difference([one], [other]), paired(stock, fold, first, second)
    assert gain.difference == pytest.approx(exact.difference, abs=1e-6) and gain.difference > 0.02
    assert (gain.low, gain.high) == pytest.approx((exact.low, exact.high), abs=0.006)
    assert np.std(one.replicates - other.replicates) < np.std(one.replicates), "the same draws for both"
    per_run, (low, high) = mean_of_folds([one, one])
    assert per_run == pytest.approx(one.auc) and low < np.mean(per_run) < high
    assert np.isnan(difference([one], [one]).p_value), "one detector against itself"


def test_scores_of_another_probe_are_not_taken_over(tmp_path, monkeypatch):
    args, stock = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(fingerprint="0123456789")
    before = detectors.models_folder(args, stock, ["--depth", "8"])
    assert detectors.models_folder(args, stock, ["--depth", "8"]) == before != detectors.models_folder(args, stock, [])
    monkeypatch.setattr(detectors, "BETWEEN", 1.0)
    assert detectors.models_folder(args, stock, ["--depth", "8"]) != before


def test_groups_weigh_alike():
    weights = alike(np.array(["a", "b", "a", "a", "b"]))
    np.testing.assert_allclose(weights, [1 / 6, 1 / 4, 1 / 6, 1 / 6, 1 / 4])


def test_folds_without_images():
    stock = stock_of(*PARTS)
    check_images(stock_of(*PARTS, ("fake/Z", 0, 1)), [FOLD], {})
    with pytest.raises(ValueError, match=r"no image of real/W is left \({'no face': 3}\)"):
        check_images(stock, [FOLD._replace(photographs=("real/W",))], {"real/W": {"no face": 3}})
    with pytest.raises(ValueError, match="4 real and 0 fake images are left in the train split"):
        check_images(stock, [FOLD], {})


# ---------------------------------------------------------------------------------------------------- the whole command


DRAWN = {  # {data set in its root: what is wrong with its faces, how many}
    "one/real/Photos": (None, 20),
    "one/real/Portraits": (None, 12),
    "one/fake/Gan": ("IrisMismatch", 12),
    "two/real/Heads": (None, 12),
    "two/fake/Gan2": ("BlurredRegion", 12),
    "two/fake/Diffusion": ("OffAxisMouth", 14),
}


def draw_data_sets(root: Path) -> None:
    """Two data roots of drawn faces."""
    rng = np.random.default_rng(5)
    for name, (generator, count) in DRAWN.items():
        for i in range(count):
            Image.fromarray(draw_face(rng, generator, 240)).save(root / name / f"{i:02}.png")


def lay_out(root: Path) -> None:
    """The folders of the data sets, a trunk, the folds."""
    for name in DRAWN:
        (root / name).mkdir(parents=True)
    torch.save(torchvision.models.VisionTransformer(96, 24, 2, 12, 24, 96).state_dict(), root / "vit.pth")
    folds = {
        "about": "of a test",
        "new families": {"GANs": {"fakes": ["Gan", "Gan2"], "photographs": ["Portraits"]}},
        "new sources": {"Diffusion": {"fakes": ["Diffusion"], "photographs": ["Heads"]}},
    }
    (root / "folds.json").write_text(json.dumps(folds))


def arguments(root: Path, *options: object) -> list[str]:
    return [
        *map(str, ("--data_root", root / "one", root / "two", "--folds", root / "folds.json")),
        *map(str, ("--output_dir", root / "out", "--init_from", root / "vit.pth")),
        *"--img_size 96 --patch_size 24 --seeds 2 --workers 1 --device cpu --embed_dim 24 --depth 2".split(),
        *"--read_blocks 1 2 --epochs 1 --num_workers 0".split(),
        *map(str, options),
    ]


def compare(root: Path, *options: object) -> dict:
    return unseen.main(*unseen.get_args_parser().parse_known_args(arguments(root, *options)))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The scripts run in this process, which takes no seconds to import torch. Drawn faces are one person's to dlib's
    network: copies alone are near each other here."""
    seen: list[str] = []

    def run_here(command: list[str]) -> None:
        seen.append(Path(command[0]).stem)
        script = {module.__name__: module for module in (preprocess, feature_extraction, train)}[seen[-1]]
        script.main(script.get_args_parser().parse_args(command[1:]))

    monkeypatch.setattr(train, "stopping_on_signals", lambda run: contextlib.nullcontext())
    for module in (images, detectors):
        monkeypatch.setattr(module, "run", run_here)
    monkeypatch.setattr(near_duplicates, "MAX_FACE_DISTANCE", 0.01)
    monkeypatch.setattr(near_duplicates, "MAX_HASH_DISTANCE", 0)
    return seen


def write_others(root: Path) -> Path:
    """Scores of somebody who knows the answer, by name and with no ending."""
    with open(root / "others.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "score"])
        for path in sorted(root.glob("[ot][nw][eo]/*/*/*.png")):
            kind, name = path.parts[-3:-1]
            writer.writerow([f"{kind}/{name}/{path.stem if name == 'Gan' else path.name}", int(kind == "fake")])
    return root / "others.csv"


@pytest.mark.slow
def test_from_files_to_tables(tmp_path, calls, monkeypatch, capsys):
    lay_out(tmp_path)
    draw_data_sets(tmp_path)
    scored = detectors.score_model

    def stopped(args, stock, job):
        if calls.count("train") == 3:
            raise ValueError("stopped; the same command goes on")
        scored(args, stock, job)

    monkeypatch.setattr(detectors, "score_model", stopped)
    theirs = f"theirs={write_others(tmp_path)}"
    with pytest.raises(ValueError, match="stopped"):
        compare(tmp_path, "--scores", theirs)
    printed = capsys.readouterr().out
    assert "train  8 models, 0 of them are there already" in printed
    assert re.search(r"images/s: 8 models of 1 epochs, one at a time, about \d+ minutes", printed)
    monkeypatch.setattr(detectors, "score_model", scored)
    calls.clear()
    summary = compare(tmp_path, "--scores", theirs)
    printed = capsys.readouterr().out
    assert "8 models, 1 of them are there already" in printed and calls.count("train") == 8
    tables = (tmp_path / "out/results.md").read_text()
    assert tables in printed and json.loads((tmp_path / "out/results.json").read_text()) == json.loads(
        json.dumps(summary)
    )

    names = [*PROBES, "LAMM-ViT", "plain ViT", "theirs", *SHORTCUTS]
    for kind, fold, sets in (
        ("new families", "GANs", ("real/Portraits", "fake/Gan", "fake/Gan2")),
        ("new sources", "Diffusion", ("real/Heads", "fake/Diffusion")),
    ):
        of = summary["folds"][kind][fold]
        assert [*of["photographs"], *of["fakes"]] == list(sets) and list(of["detectors"]) == names
        assert f"| left out | {' | '.join(names)} |" in re.sub(" +", " ", tables)
        for name, one in of["detectors"].items():
            assert len(one["auc"]) == (2 if name.startswith(("LAMM-ViT", "plain ViT")) else 1)
            assert summary["means"][kind][name]["auc"] == pytest.approx(one["auc"]), "the mean of one fold"
            assert {*one["alarms"], *one["found"]} == set(sets)
        perfect = of["detectors"]["theirs"]
        assert [*perfect["auc"], *perfect["known"]] == pytest.approx([1, 1]) and set(
            perfect["found"][sets[-1]]["0.05"]
        ) == {1.0}
        assert set(perfect["alarms"][sets[0]]["0.01"]) == {0.0} and perfect["log_loss"][0] < 0.3
        gains = summary["differences"][kind]
        head, plain = "LAMM-ViT, head alone", "plain ViT, head alone"
        alone = [f"{head} - {plain}", f"{head} - probe, last class token", f"{plain} - probe"]
        assert list(gains) == ["LAMM-ViT - plain ViT", "LAMM-ViT - probe", *alone]
        for pair, gain in gains.items():
            first, second = (np.mean(of["detectors"][name]["auc"]) for name in pair.split(" - "))
            assert gain[fold]["difference"] == pytest.approx(first - second, abs=1e-6)
            assert gain[fold]["test"] == ("DeLong" if fold == "Diffusion" else "bootstrap")
        folder = next((tmp_path / "out/models").glob(f"*/*/{fold}_*/LAMM-ViT_head_alone"))
        with np.load(folder / "seed_0/scores.npz") as one, np.load(folder / "seed_1/scores.npz") as other:
            assert {*one} == {*other} > {"log_odds"}
            for values in one:
                assert 0 < np.abs(one[values] - other[values]).max(), "another draw of the views"
        masks = summary["masks"][kind][fold]
        assert masks.keys() == {OWN, *WRONG} and masks[OWN] == (
            0,
            pytest.approx(np.mean(of["detectors"]["LAMM-ViT"]["auc"])),
        )
    read = [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "out/trunk").iterdir()]
    assert len(read) == 1 + 2 * 3, "of the trunk alone, and of each of two heads the images and two draws of views"
    assert all(names == read[0] for names in read) and len(read[0]) == len(DRAWN)
    assert "`python benchmarks/unseen.py --data_root" in tables.splitlines()[-1]
    check_left_out(tmp_path / "out/left_out.csv", summary)
    check_a_model(tmp_path, summary)

    calls.clear()
    lost = next((tmp_path / "out/models").glob("*/new_sources/Diffusion_*/LAMM-ViT/seed_1"))
    shutil.rmtree(lost)
    again = compare(tmp_path, "--scores", theirs, "--delete_models")
    assert again == summary, "the same numbers, trained again"
    assert calls.count("train") == 2, "to foretell the time, and the model that was missing"
    assert not list(lost.glob("*.pth")) and (lost.parent / "seed_0/best_model.pth").exists()
    calls.clear()
    compare(tmp_path, "--detectors", "probe", "--epochs", 2)
    assert "train" not in calls and len(list((tmp_path / "out/models").iterdir())) == 2, "other options, other scores"


def check_left_out(path: Path, summary: dict) -> None:
    """Its rows give the shares of the tables once more."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for kind, folds in summary["folds"].items():
        for fold, of in folds.items():
            mine = [row for row in rows if (row["kind"], row["fold"]) == (kind, fold)]
            assert {row["path"].rsplit("/", 1)[0] for row in mine} == {*of["photographs"], *of["fakes"]}
            for name, one in of["detectors"].items():
                assert all(0 <= float(row[f"{name}: probability"]) <= 1 for row in mine)
                for data_set, shares in (one["alarms"] | one["found"]).items():
                    of_set = [row for row in mine if row["path"].rsplit("/", 1)[0] == data_set]
                    called = [float(row[f"{name}: fake at 5 %"]) for row in of_set]
                    assert np.mean(called) == pytest.approx(np.mean(shares["0.05"]), abs=1e-5)


def check_a_model(root: Path, summary: dict) -> None:
    """What training saw, and the AUC once more from the model itself, by another way."""
    folder = next((root / "out/models").glob("*/new_families/GANs_*/plain_ViT/seed_1"))
    model, checkpoint = load_checkpoint(folder / "best_model.pth")
    assert set(checkpoint["datasets"]) == {"real/Photos", "real/Heads", "fake/Diffusion"}
    assert checkpoint["arguments"]["tune"] == "norms" and checkpoint["arguments"]["head"] == "probe"
    assert len(checkpoint["arguments"]["without"]) == 4 and not model.config.region_guidance
    features = root / "out/features/equalised"
    scores = {
        name: predict_scores(model, FaceDataset(sorted(features.glob(f"*/{name}/*.h5"))))
        for name in ("Portraits", "Gan", "Gan2")
    }
    aucs = [
        roc_auc_score(np.r_[np.zeros(len(scores["Portraits"])), np.ones(len(of))], np.r_[scores["Portraits"], of])
        for of in (scores["Gan"], scores["Gan2"])
    ]
    judged = summary["folds"]["new families"]["GANs"]["detectors"]["plain ViT"]
    assert judged["auc"][1] == pytest.approx(np.mean(aucs))


def test_what_it_refuses(tmp_path, calls):
    lay_out(tmp_path)
    for options, message in (
        (("--seed", 3), "--seed: this script sets it"),
        (("--lrr", 3), "train.py does not take these options"),
        (("--lr", -3), "cannot be negative"),
        (("--seeds", 0), "at least 1"),
        (("--img_size", 100), "a multiple of --patch_size"),
        (("--read_blocks", 1), "have to rise and end with depth, 2"),
        (("--detectors", "LAMM-ViT", "without the diversity loss"), "the same as LAMM-ViT"),
        (("--folds", tmp_path / "none.json"), "No such file"),
        (("--data_root", tmp_path / "one"), "no data set fake/Gan2"),
        (
            ("--init_from", "", "--tune", "all", "--head", "random", "--probe_views", 0),
            "probe, last class token, probe, plain ViT, head alone, LAMM-ViT, head alone: a probe of a trunk",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            compare(tmp_path, *options)
    assert not calls and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/settings.json").write_text("{}")
    with pytest.raises(ValueError, match="holds results with other options"):
        compare(tmp_path)


def test_scores_of_others(features, datasets, tmp_path):
    stock, data_sets = load_stock(features), images.data_sets_of(datasets)
    assert len(stock.labels) == 121 and (stock.labels == [name.startswith("fake/") for name in stock.names]).all()
    assert [int((stock.splits == split).sum()) for split in range(3)] == [
        len(FaceDataset(sorted(features.glob(f"*/*/{split}_features.h5")))) for split in ("train", "val", "test")
    ]

    def scores(lines: list[str], heads: str = "path,score", name: str = "theirs") -> np.ndarray:
        (tmp_path / "scores.csv").write_text("\n".join([heads, *lines]))
        return read_others(f"{name}={tmp_path / 'scores.csv'}", stock, data_sets)[1]

    lines = [f"{path},{i / 200}" for i, path in enumerate(stock.paths)]
    np.testing.assert_allclose(expit(scores(lines))[0], np.arange(121) / 200, atol=1e-11)
    assert (scores([line.replace(".png", "") for line in lines]) == scores(lines)).all()
    assert scores([*lines[:-1], f"{stock.paths[-1]},7.5"])[0, -1] == 7.5, "log odds"
    for wrong, message in (
        (lines[:-2], f"no score for 2 of 121 images, {stock.paths[-2]} for one"),
        ([*lines, lines[0]], "is in it twice"),
        ([*lines[:-1], f"{stock.paths[-1]},much"], "could not convert"),
        ([*lines[:-1], f"{stock.paths[-1]},nan"], "is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            scores(wrong)
    with pytest.raises(ValueError, match="no column 'score'"):
        scores(lines, "path,logit")
    with pytest.raises(ValueError, match="NAME none of probe, last class token"):
        scores(lines, name="plain ViT")


def test_the_trunk_is_read_as_a_head_reads_it(features, tmp_path):
    """The mean of the patches after two blocks is what the head of a model on this trunk gets."""
    torch.manual_seed(0)
    torch.save(torchvision.models.VisionTransformer(224, 56, 3, 12, 24, 96).state_dict(), tmp_path / "vit.pth")
    options = train_parser().parse_args(
        ["--init_from", f"{tmp_path}/vit.pth", "--patch_size", "56", "--embed_dim", "24"]
    )
    model, _ = build_trunk(options, 224)
    samples = load_stock(features).dataset(["real/Consistent"]).read([0, 5, 7])
    pictures, masks = (torch.from_numpy(samples[name]) for name in ("image", "region_masks"))
    with torch.inference_mode():
        read = read_blocks(model, pictures, torch.zeros(3, 8, 4, 4))
        x = model.norm(model.blocks[0](model.norm_pre(tokens_of(model, pictures)), None, None, None, None))
    assert read.shape == (3, 3, 2, 24) and read.dtype == np.float16 and masks.shape[-1] == 14
    np.testing.assert_allclose(read[:, 0, 0], x[:, 0], atol=0.01)
    np.testing.assert_allclose(read[:, 0, 1], x[:, 1:].mean(dim=1), atol=0.01)
    assert np.abs(read[:, 0] - read[:, 2].astype(np.float32)).max() > 0.1, "blocks differ"


def tokens_of(model: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    patches = model.patch_embed(model.normalize(pictures)).flatten(2).transpose(1, 2)
    return torch.cat([model.cls_token.expand(len(pictures), -1, -1), patches], dim=1) + model.pos_embed
