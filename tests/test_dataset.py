"""dataset.py: the masks, the mirror, the schema, and reading in any process."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cv2
import h5py
import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT
from torch.utils.data import DataLoader

from dataset import SAMPLINGS, FaceDataset, TrainSampler
from faces.alignment import GREY
from faces.finder import FOUND_BY
from faces.regions import MASK_STYLES, MIRROR_LANDMARKS, REGIONS, draw_region_masks
from samples.feature_files import (
    PER_SAMPLE,
    FeatureFileError,
    find_feature_files,
    open_features,
    rows_offset,
    write_features,
)
from samples.transforms import (
    TrainTransform,
    color_jitter,
    gaussian_blur,
    gaussian_noise,
    horizontal_flip,
    jpeg_compression,
    tighter_frame,
)


def mean_face(side: int = 224) -> np.ndarray:
    """A schematic symmetric face: (68, 2) in pixels of a square image."""
    jaw = [(112 - 62 * np.cos(np.pi * i / 16), 95 + 85 * np.sin(np.pi * i / 16)) for i in range(17)]
    left_brow = [(62 + 9 * i, 76 - 5 * np.sin(np.pi * i / 4)) for i in range(5)]
    right_brow = [(223 - x, y) for x, y in reversed(left_brow)]
    nose = [(111.5, 90 + 10 * i) for i in range(4)] + [
        (98 + 6.75 * i, 128 + 4 * np.sin(np.pi * i / 4)) for i in range(5)
    ]
    left_eye = [(70, 92), (76, 88), (84, 88), (90, 92), (84, 95), (76, 95)]
    right_eye = [(223 - x, y) for x, y in (left_eye[i] for i in (3, 2, 1, 0, 5, 4))]
    outer = [
        (86, 150),
        (94, 145),
        (104, 142),
        (111.5, 144),
        (119, 142),
        (129, 145),
        (137, 150),
        (129, 158),
        (119, 162),
        (111.5, 163),
        (104, 162),
        (94, 158),
    ]
    inner = [(90, 150), (104, 148), (111.5, 149), (119, 148), (133, 150), (119, 154), (111.5, 155), (104, 154)]
    return np.array(jaw + left_brow + right_brow + nose + left_eye + right_eye + outer + inner, np.float32) * (
        side / 224
    )


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("style", MASK_STYLES)
def test_masks_are_shares_of_the_patches_area_and_none_is_empty(style):
    masks = draw_region_masks(mean_face(), (224, 224), 14, style)
    assert masks.shape == (8, 14, 14) and masks.dtype == np.float32
    assert masks.min() >= 0 and masks.max() <= 1
    assert (masks.sum(axis=(1, 2)) > 0.3).all(), masks.sum(axis=(1, 2))
    assert ((masks > 0.01) & (masks < 0.99)).any()  # averaged over area, not sampled


@pytest.mark.parametrize("style", MASK_STYLES)
@pytest.mark.parametrize("side", [112, 448, 1024])
def test_masks_scale_with_the_image(style, side):
    reference = draw_region_masks(mean_face(), (224, 224), 14, style)
    scaled = draw_region_masks((mean_face() + 0.5) * side / 224 - 0.5, (side, side), 14, style)
    assert np.abs(reference - scaled).mean() < 0.01


def test_masks_lie_where_the_landmarks_are():
    centres = {region: mean_face()[list(members)].mean(axis=0) for region, members in REGIONS.items()}
    ticks = np.arange(28) * 8 + 3.5
    for style in MASK_STYLES:
        masks = draw_region_masks(mean_face(), (224, 224), 28, style)
        for (region, (x, y)), mask in zip(centres.items(), masks):
            if region != "face_outline":  # an arc of points, an area of the whole face
                found = (mask.sum(axis=0) @ ticks / mask.sum(), mask.sum(axis=1) @ ticks / mask.sum())
                assert np.hypot(found[0] - x, found[1] - y) < 6, (style, region)


def test_no_outline_crosses_itself():
    """The authors' code fills lips and eyebrows in the order of landmark numbers; here no area cancels or leaks."""
    masks = dict(zip(REGIONS, draw_region_masks(mean_face(), (224, 224), 224)))
    columns = np.flatnonzero(masks["upper_lip"].any(axis=0))
    for x in columns[4:-4]:
        upper, lower = (np.flatnonzero(masks[lip][:, x]) for lip in ("upper_lip", "lower_lip"))
        assert (np.diff(upper) == 1).all() and (np.diff(lower) == 1).all()  # one run a column
        assert upper.max() <= lower.min() + 1
    between = masks["eyebrows"][:, 100:124]
    assert not between.any(), "the two eyebrows are two areas"


def test_mouth_corners_are_two_discs():
    masks = dict(zip(REGIONS, draw_region_masks(mean_face(), (224, 224), 224)))
    corners = masks["mouth_corners"]
    assert corners[150, 86] == 1 and corners[150, 137] == 1 and corners[150, 111] == 0
    half = corners[:, :112].sum()
    assert half == pytest.approx(corners[:, 112:].sum(), rel=0.1)


def test_no_pixel_of_a_region_is_missed_and_none_is_left_over_from_another():
    """Only some rows of patches are averaged for each region; the average over the whole image knows better."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        landmarks = mean_face() * rng.uniform(0.1, 2.5) + rng.uniform(-150, 150, 2) + rng.normal(0, 5, (68, 2))
        whole = draw_region_masks(landmarks, (224, 224), 1)[:, 0, 0]
        for grid_size in (7, 14, 112):
            masks = draw_region_masks(landmarks, (224, 224), grid_size)
            np.testing.assert_allclose(masks.mean(axis=(1, 2)), whole, atol=1e-6)


def test_landmarks_outside_the_image_and_broken_ones():
    masks = draw_region_masks(mean_face() + 500, (224, 224), 14)
    assert not masks.any()
    for broken in (np.full((68, 2), np.nan), np.zeros((5, 2))):
        with pytest.raises(ValueError, match="landmarks"):
            draw_region_masks(broken, (224, 224), 14)
    with pytest.raises(ValueError, match="mask style"):
        draw_region_masks(mean_face(), (224, 224), 14, "hull")


# --------------------------------------------------------------------------------------------------------------- mirror


def test_mirror_is_its_own_inverse_and_keeps_region_members():
    assert (MIRROR_LANDMARKS[MIRROR_LANDMARKS] == np.arange(68)).all()
    for region, members in REGIONS.items():
        mirrored = {"left_eye": "right_eye", "right_eye": "left_eye"}.get(region, region)
        assert set(MIRROR_LANDMARKS[list(members)]) == set(REGIONS[mirrored])


@pytest.mark.parametrize("style", MASK_STYLES)
def test_flipped_masks_are_the_masks_of_flipped_landmarks(style):
    landmarks = mean_face() + np.array([9, 4], np.float32)  # off the middle, so that a flip moves something
    landmarks[36:42, 1] -= 8  # and one eye above the other, so that a swap shows
    masks = draw_region_masks(landmarks, (224, 224), 14, style)
    image = np.arange(224 * 224 * 3).reshape(224, 224, 3).astype(np.uint8)
    flipped_image, flipped_landmarks, flipped_masks = horizontal_flip(image, landmarks, masks)
    np.testing.assert_array_equal(flipped_image, image[:, ::-1])
    np.testing.assert_allclose(draw_region_masks(flipped_landmarks, (224, 224), 14, style), flipped_masks, atol=0.03)
    again = horizontal_flip(flipped_image, flipped_landmarks, flipped_masks)
    for result, original in zip(again, (image, landmarks, masks)):
        np.testing.assert_allclose(result, original, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- schema


def write_file(
    path,
    count: int,
    label: int = 0,
    side: int = 32,
    fail_after: int | None = None,
    compress: bool = False,
    given: int | None = None,
) -> None:
    rng = np.random.default_rng(count)
    table = {"labels": [label] * count, "paths": [f"real/X/{i}.png" for i in range(count)], "found_by": [0] * count}
    table["originals"] = [f"JPEG {i + 1}x{side}" for i in range(count)]
    table["treatments"] = [""] * count
    table["sha256"] = rng.integers(0, 256, (count, 32), dtype=np.uint8)

    def blocks():
        for i in range(count if given is None else given):
            if i == fail_after:
                raise RuntimeError("the power is gone")
            image, masks = (
                rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8),
                np.full((1, 8, side // 16, side // 16), i / count),
            )
            yield {"images": image, "landmarks": mean_face(side)[None] + i, "region_masks": masks}

    write_features(path, side, side // 16, {"data_set": "real/X"}, table, blocks(), compress)


def test_schema_is_as_documented(tmp_path):
    write_file(tmp_path / "a.h5", 5)
    with h5py.File(tmp_path / "a.h5") as file:
        assert {
            name: (file[name].shape, file[name].dtype.kind)
            for name in ("images", "landmarks", "region_masks", "labels", "sha256")
        } == {
            "images": ((5, 32, 32, 3), "u"),
            "landmarks": ((5, 68, 2), "f"),
            "region_masks": ((5, 8, 2, 2), "f"),
            "labels": ((5,), "u"),
            "sha256": ((5, 32), "u"),
        }
        assert file["images"].chunks == (1, 32, 32, 3)
        assert file["paths"].asstr()[3] == "real/X/3.png" and file["originals"].asstr()[3] == "JPEG 4x32"
        assert h5py.check_enum_dtype(file["found_by"].dtype) == {name: code for code, name in enumerate(FOUND_BY)}
        assert list(file.attrs["regions"]) == list(REGIONS)


def test_a_file_that_was_not_finished_is_not_there(tmp_path):
    with pytest.raises(RuntimeError):
        write_file(tmp_path / "a.h5", 5, fail_after=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compress", [False, True])
def test_a_file_with_samples_missing_is_not_there(tmp_path, compress):
    with pytest.raises(ValueError, match="2 of 3 samples"):
        write_file(tmp_path / "a.h5", 3, given=2, compress=compress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compress", [False, True])
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch, compress):
    """test_feature_extraction.py lets real writes fail; here the disk is found full before."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(OSError, match="no space left on the disk.*a.h5"):
        write_file(tmp_path / "a.h5", 5, compress=compress)
    assert list(tmp_path.iterdir()) == []


def spoil_version(path):
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = 99


def spoil_foreign(path):
    with h5py.File(path, "w") as file:
        file["images"] = [1]


def spoil_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_missing(path):
    with h5py.File(path, "r+") as file:
        del file["landmarks"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_version, "schema 99"),
        (spoil_foreign, "not a feature file"),
        (spoil_half, "cut off"),
        (spoil_missing, "has no landmarks"),
        (None, "no such file"),
    ],
)
def test_unusable_files_are_named_with_the_way_out(tmp_path, spoil, message):
    path = tmp_path / "a.h5"
    if spoil:
        write_file(path, 4)
        spoil(path)
    with pytest.raises(FeatureFileError, match=message) as error:
        open_features(path)
    assert str(path) in str(error.value) and "feature_extraction.py" in str(error.value)


def test_find_feature_files(tmp_path):
    for name in ("real/A", "fake/B", "fake/C"):
        write_file(tmp_path / name / "val_features.h5", 1)
    assert list(find_feature_files(tmp_path, "val")) == ["real/A", "fake/B", "fake/C"]
    assert list(find_feature_files(tmp_path, "val", ["C", "real/A"])) == ["real/A", "fake/C"]
    with pytest.raises(FeatureFileError, match=r"no data set D; there are real/A, fake/B, fake/C"):
        find_feature_files(tmp_path, "val", ["A", "D"])
    with pytest.raises(FeatureFileError, match="run feature_extraction.py"):
        find_feature_files(tmp_path / "nowhere", "val")


# -------------------------------------------------------------------------------------------------------------- reading


def two_files(tmp_path) -> list:
    paths = [tmp_path / "a.h5", tmp_path / "empty.h5", tmp_path / "b.h5"]
    for path, count, label in zip(paths, (5, 0, 3), (0, 1, 1)):
        write_file(path, count, label)
    return paths


def test_samples_run_through_all_files(tmp_path):
    dataset = FaceDataset(two_files(tmp_path), grid_size=2)
    assert len(dataset) == 8 and dataset.labels.tolist() == [0] * 5 + [1] * 3
    assert list(dataset.column("originals")) == [f"JPEG {i + 1}x32" for i in (*range(5), *range(3))]
    assert list(dataset.column("paths")) == [f"real/X/{i}.png" for i in (*range(5), *range(3))]
    with h5py.File(tmp_path / "b.h5") as file:
        sample = dataset[6]
        np.testing.assert_array_equal(sample["image"], file["images"][1].transpose(2, 0, 1))
        np.testing.assert_array_equal(sample["region_masks"], file["region_masks"][1])
        np.testing.assert_array_equal(sample["landmarks"], file["landmarks"][1])
        assert (sample["label"], sample["index"]) == (1, 6)


@pytest.mark.parametrize("layout", ["in order", "compressed", "grown row by row"])
def test_a_batch_holds_what_hdf5_holds(tmp_path, layout):
    """Whether rows are read at their place in the file, inflated outside of HDF5, or by it."""
    write_file(tmp_path / "a.h5", 70, compress=layout == "compressed")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        if layout == "grown row by row":
            for name in ("images", "landmarks", "region_masks"):
                values = file[name][:]
                del file[name]
                file.create_dataset(
                    name,
                    (0, *values.shape[1:]),
                    values.dtype,
                    maxshape=(None, *values.shape[1:]),
                    chunks=(1, *values.shape[1:]),
                )
                for row in np.random.default_rng(0).permutation(70):
                    file[name].resize(max(len(file[name]), row + 1), axis=0)
                    file[name][row] = values[row]
    order = np.random.default_rng(1).permutation(70)[:40]
    batch = FaceDataset([tmp_path / "a.h5"]).read(order)
    with h5py.File(tmp_path / "a.h5") as file:
        assert (rows_offset(file["images"]) is not None) == (layout == "in order")
        np.testing.assert_array_equal(batch["image"], file["images"][:][order].transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(batch["landmarks"], file["landmarks"][:][order])
        np.testing.assert_array_equal(batch["region_masks"], file["region_masks"][:][order])


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same_after_the_parent_has_read(tmp_path, context):
    dataset = FaceDataset(two_files(tmp_path), grid_size=2, transform=TrainTransform(), seed=3)
    here = torch.from_numpy(dataset.read(range(8))["image"])  # the parent's files are open now
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=context)
    assert torch.equal(torch.cat([batch["image"] for batch in loader]), here)


def test_threads_read_the_same(tmp_path):
    for i in range(6):
        write_file(tmp_path / f"{i}.h5", 5 + i, compress=i % 2 == 0)
    dataset = FaceDataset(sorted(tmp_path.iterdir()), grid_size=2, transform=TrainTransform(), seed=3)
    batches = [np.random.default_rng(i).permutation(len(dataset))[:9] for i in range(40)]
    with ThreadPoolExecutor(4) as threads:
        for batch, indices in zip(threads.map(dataset.read, batches), batches):
            for name, values in dataset.read(indices).items():
                np.testing.assert_array_equal(batch[name], values, err_msg=name)


@pytest.mark.parametrize("indices", [[-1], [8], [0, 8], [1.5]])
def test_indices_outside_are_refused(tmp_path, indices):
    with pytest.raises(IndexError, match="from 0 to 7"):
        FaceDataset(two_files(tmp_path), grid_size=2).read(indices)


def test_no_more_files_are_open_than_allowed(tmp_path, monkeypatch):
    for i in range(12):
        write_file(tmp_path / f"{i:02}.h5", 4)
    monkeypatch.setattr(sys.modules["dataset"], "MAX_OPEN_FILES", 5)
    dataset = FaceDataset(sorted(tmp_path.iterdir()), grid_size=2)

    def handles() -> set[str]:
        return {file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))}

    before = dataset.read([0, 13, 47])
    assert len(handles()) == 3
    dataset.read(np.random.default_rng(0).permutation(48))
    assert len(handles()) == 5
    np.testing.assert_array_equal(dataset.read([0, 13, 47])["image"], before["image"])
    dataset._owner = -1  # as it looks to a forked worker
    dataset[0]
    assert len(handles()) == 1, "handles of the parent are not used"


def test_a_file_that_is_replaced_while_it_is_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["dataset"], "MAX_OPEN_FILES", 1)
    dataset = FaceDataset(two_files(tmp_path), grid_size=2)
    write_file(tmp_path / "a.h5", 5, 1)
    with pytest.raises(FeatureFileError, match="a.h5: was written anew"):
        dataset[0]


@pytest.mark.slow
def test_ten_million_samples_index_in_bounded_memory(tmp_path):
    """Of rows that were never written: the files are small, the index is not."""
    for number in range(4):
        write_file(path := tmp_path / f"{number}.h5", 0, side=16)
        with h5py.File(path, "r+") as file:
            for name in PER_SAMPLE:
                shape, kind = file[name].shape[1:], file[name].dtype
                del file[name]
                file.create_dataset(name, (2_500_000, *shape), kind, chunks=(4096 if name == "labels" else 1, *shape))
    source = (
        "import psutil, sys, numpy as np; from pathlib import Path; from dataset import FaceDataset,"
        " TrainSampler\nstart = psutil.Process().memory_info().rss\ndataset ="
        " FaceDataset(sorted(Path(sys.argv[1]).iterdir())); sampler = TrainSampler(dataset.labels, 'natural',"
        " 0)\nassert len(dataset) == 10_000_000 and dataset.read(*sampler.draw(9_000_000, 32))['image'].shape =="
        " (32, 3, 16, 16)\nprint((psutil.Process().memory_info().rss - start) / 1e6)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 300, "MB: a byte a label, eight a sample's place in the epoch, and a margin"


def test_files_of_different_runs_are_not_mixed(tmp_path):
    for name, run in (("real/A", "one"), ("fake/B", "one"), ("fake/C", "two")):
        write_file(tmp_path / name / "val_features.h5", 1)
        with h5py.File(tmp_path / name / "val_features.h5", "r+") as file:
            file.attrs["fingerprint"] = run
    with pytest.raises(FeatureFileError, match=r"different runs of feature_extraction.py: real/A, fake/B \| fake/C"):
        find_feature_files(tmp_path, "val")
    assert list(find_feature_files(tmp_path, "val", ["A", "B"])) == ["real/A", "fake/B"]


def test_other_masks_than_the_stored_ones_are_drawn_from_landmarks(tmp_path):
    paths = two_files(tmp_path)
    landmarks = FaceDataset(paths, grid_size=2)[1]["landmarks"]
    for grid_size, style in ((2, "gaussian"), (4, "polygon"), (8, "gaussian")):
        sample = FaceDataset(paths, grid_size, style)[1]
        np.testing.assert_array_equal(sample["region_masks"], draw_region_masks(landmarks, (32, 32), grid_size, style))


def test_files_of_different_sizes_and_no_sample_at_all(tmp_path):
    write_file(tmp_path / "a.h5", 2, side=32)
    write_file(tmp_path / "b.h5", 2, side=48)
    write_file(tmp_path / "empty.h5", 0)
    with pytest.raises(FeatureFileError, match="different sizes"):
        FaceDataset([tmp_path / "a.h5", tmp_path / "b.h5"], 2)
    with pytest.raises(FeatureFileError, match="not one sample"):
        FaceDataset([tmp_path / "empty.h5"], 2)


# ------------------------------------------------------------------------------------------------------- training order


def test_real_and_fake_take_turns_and_all_of_a_class_are_seen_as_often():
    labels = np.array([0] * 7 + [1] * 20)
    indices, passes = TrainSampler(labels, "balanced", seed=3).draw(0, 400)
    assert (labels[indices] == np.arange(400) % 2).all()
    for label in (0, 1):
        counts = np.bincount(indices[labels[indices] == label], minlength=27)[labels == label]
        assert counts.max() - counts.min() <= 1
        for number in range(200 // (labels == label).sum()):  # whole passes: each sample once
            assert (
                sorted(indices[(labels[indices] == label) & (passes == number)])
                == np.flatnonzero(labels == label).tolist()
            )
    assert len(set(zip(indices.tolist(), passes.tolist()))) == 400, "no sample is drawn twice with the same transforms"
    assert indices[:40].tolist() != indices[40:80].tolist()


def test_natural_order_is_passes_over_all():
    labels = np.array([0] * 7 + [1] * 20)
    indices, passes = TrainSampler(labels, "natural", seed=3).draw(0, 270)
    for number in range(10):
        assert sorted(indices[passes == number]) == list(range(27))


def test_data_sets_of_a_class_take_turns_whatever_their_size():
    labels = np.array([0] * 30 + [1] * 29)
    sources = np.array([0] * 30 + [1] * 4 + [2] * 25)  # one of photographs, a small and a large one of fakes
    indices, passes = TrainSampler(labels, "sources", 3, sources).draw(0, 400)
    assert (labels[indices] == np.arange(400) % 2).all()
    assert np.bincount(sources[indices]).tolist() == [200, 100, 100]
    for source, size in enumerate((30, 4, 25)):
        mine = sources[indices] == source
        for number in range(np.bincount(sources[indices])[source] // size):  # whole passes: each sample once
            assert sorted(indices[mine & (passes == number)]) == np.flatnonzero(sources == source).tolist()
    assert len(set(zip(indices.tolist(), passes.tolist()))) == 400, "no sample is drawn twice with the same transforms"


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_order_does_not_depend_on_how_it_is_asked_for(sampling):
    labels = np.random.default_rng(0).integers(0, 2, 50)
    sources = 2 * labels + np.arange(50) // 25
    whole = np.stack(TrainSampler(labels, sampling, 7, sources).draw(0, 240))
    for size in (1, 8, 48):
        sampler = TrainSampler(labels, sampling, 7, sources)
        np.testing.assert_array_equal(
            np.concatenate([sampler.draw(start, size) for start in range(0, 240, size)], axis=1), whole
        )
    sampler = TrainSampler(labels, sampling, 7, sources)
    for start in (200, 8, 96):  # back and forth
        np.testing.assert_array_equal(sampler.draw(start, 16), whole[:, start : start + 16])
    assert not np.array_equal(whole, TrainSampler(labels, sampling, 8, sources).draw(0, 240))


def test_transforms_of_a_pass_are_its_own(tmp_path):
    write_file(tmp_path / "a.h5", 40)
    dataset = FaceDataset([tmp_path / "a.h5"], 2, transform=TrainTransform(), seed=1)
    first, second = (dataset.read(range(40), [draw] * 40)["image"] for draw in (0, 1))
    assert not np.array_equal(first, second)
    mixed = dataset.read(range(40), [0, 1] * 20)["image"]
    np.testing.assert_array_equal(mixed[::2], first[::2])
    np.testing.assert_array_equal(mixed[1::2], second[1::2])
    dataset.set_epoch(1)
    np.testing.assert_array_equal(dataset.read(range(40))["image"], second)


# ----------------------------------------------------------------------------------------------------------- transforms


def test_transforms_are_drawn_afresh_every_epoch_and_by_nothing_else(tmp_path):
    write_file(tmp_path / "a.h5", 40)
    dataset = FaceDataset([tmp_path / "a.h5"], 2, transform=TrainTransform(), seed=1)

    def epoch(number: int) -> np.ndarray:
        dataset.set_epoch(number)
        return dataset.read(range(40))["image"]

    first, second = epoch(1), epoch(2)
    np.random.seed(99)
    cv2.setRNGSeed(99)
    np.testing.assert_array_equal(epoch(1), first)
    assert not np.array_equal(first, second)
    alone = np.stack([dataset[i]["image"] for i in reversed(range(40))])[::-1]
    np.testing.assert_array_equal(alone, first)


def test_each_corruption_has_its_probability_and_range(monkeypatch):
    drawn = {"noise": [], "jpeg": [], "blur": []}
    module = sys.modules["samples.transforms"]
    monkeypatch.setattr(module, "gaussian_noise", lambda image, sigma, rng: drawn["noise"].append(sigma) or image)
    monkeypatch.setattr(module, "jpeg_compression", lambda image, quality: drawn["jpeg"].append(quality) or image)
    monkeypatch.setattr(module, "gaussian_blur", lambda image, sigma: drawn["blur"].append(sigma) or image)
    image, landmarks, masks = (
        np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
        np.zeros((68, 2), np.float32),
        np.zeros((8, 4, 4), np.float32),
    )
    transform, flips = TrainTransform(), 0
    for i in range(4000):
        flips += not np.array_equal(transform(image, landmarks, masks, np.random.default_rng(i))[0], image)
    assert 0.47 < flips / 4000 < 0.53
    for name, low, high in (("noise", 0.05, 0.25), ("jpeg", 50, 90), ("blur", 1, 5)):
        assert 0.085 < len(drawn[name]) / 4000 < 0.115, name
        assert (
            low <= min(drawn[name]) < low + 0.05 * (high - low)
            and high - 0.05 * (high - low) < max(drawn[name]) <= high
        ), name


def test_color_jitter():
    """Means and contrasts move within what the strength allows, each channel a little apart; the landmarks' places do
    not.
    """
    image, landmarks, masks = (
        cv2.resize(np.random.default_rng(0).integers(70, 150, (8, 8, 3), dtype=np.uint8), (64, 64)),
        np.zeros((68, 2), np.float32),
        np.zeros((8, 4, 4), np.float32),
    )
    gains, contrasts = [], []
    for seed in range(300):
        made, *_ = TrainTransform(0.25)(image, landmarks, masks, np.random.default_rng(seed))
        before, after = image.astype(float), made.astype(float)
        gains.append(np.log(after.mean(axis=(0, 1)) / before.mean(axis=(0, 1))))
        contrasts.append(color_jitter(image, 0.25, np.random.default_rng(seed)).std() / image.std())
    gains = np.array(gains)
    assert np.abs(gains).max() < 0.25 * 4 / 3 + 0.02 and gains.std(axis=0).min() > 0.1
    assert 0.03 < (gains - gains.mean(axis=1, keepdims=True)).std() < 0.06, "white balance"
    assert np.exp(-0.4) < min(contrasts) < 0.85 and 1.15 < max(contrasts) < np.exp(0.4)
    assert np.array_equal(color_jitter(image, 0.0, np.random.default_rng(0)), image)
    one, other = (TrainTransform(0.25)(image, landmarks, masks, np.random.default_rng(7))[0] for _ in range(2))
    assert np.array_equal(one, other)


def test_what_the_corruptions_do():
    rng = np.random.default_rng(0)
    gray = np.full((224, 224, 3), 128, np.uint8)
    for sigma in (0.05, 0.2):
        noise = gaussian_noise(gray, sigma, rng).astype(float) - 128
        assert noise.std() == pytest.approx(255 * sigma, rel=0.02) and abs(noise.mean()) < 1
        assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02  # channels are independent
    edge = gray.copy()
    edge[:, 112:] = 28
    for sigma in (1.0, 4.0):
        spread = -np.diff(gaussian_blur(edge, sigma)[100, :, 0].astype(float)) / 100  # the kernel, summed over one axis
        middle = (np.arange(223) * spread).sum()
        assert spread.sum() == pytest.approx(1, abs=0.01) and np.sqrt(
            ((np.arange(223) - middle) ** 2 * spread).sum()
        ) == pytest.approx(sigma, rel=0.06)
    picture = cv2.resize(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8), (224, 224), interpolation=cv2.INTER_CUBIC)
    errors = [np.abs(jpeg_compression(picture, quality).astype(float) - picture).mean() for quality in (90, 50)]
    assert 0 < errors[0] < errors[1] < 6
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    assert np.abs(jpeg_compression(red, 90).astype(int) - red).max() <= 3, "red stays red: the order of channels"


def test_a_tighter_frame_moves_nothing_and_leaves_grey_around():
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
    landmarks = rng.uniform(30, 66, (68, 2)).astype(np.float32)
    changed = 0
    for seed in range(20):
        made = tighter_frame(image, landmarks, np.random.default_rng(seed))
        same = (made == image).all(axis=2)
        left, top = landmarks.mean(axis=0) - 0.27 * 96
        right, bottom = landmarks.mean(axis=0) + 0.27 * 96
        assert same[int(top) + 2 : int(bottom) - 2, int(left) + 2 : int(right) - 2].all(), "the face stays"
        assert (made[~same] == GREY).all()
        rows, columns = (np.flatnonzero(same.any(axis=axis)) for axis in (1, 0))
        assert same[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "what is seen is a rectangle"
        changed += not same.all()
    assert changed > 15
    outside = landmarks + 500
    np.testing.assert_array_equal(tighter_frame(image, outside, np.random.default_rng(0)), image)


def test_wild_views_differ_from_draw_to_draw_and_keep_landmarks_and_masks():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    landmarks, masks = np.full((68, 2), 30, np.float32), np.random.default_rng(1).random((8, 4, 4), dtype=np.float32)
    transform = TrainTransform(augment="wild")
    views = [transform(image, landmarks, masks, np.random.default_rng(seed)) for seed in range(8)]
    assert len({view.tobytes() for view, _, _ in views}) == 8
    for view, moved, drawn in views:
        assert view.shape == image.shape and view.dtype == np.uint8
        assert sorted(drawn.ravel()) == sorted(masks.ravel()) and moved[0, 0] in (30, 33)  # mirrored, or as they were
    again = transform(image, landmarks, masks, np.random.default_rng(3))
    np.testing.assert_array_equal(again[0], views[3][0])


def test_a_crop_takes_its_landmarks_and_masks_along():
    """What is drawn at a landmark is at the landmark after the crop; the masks are those of the landmarks."""
    rng = np.random.default_rng(3)
    landmarks = rng.uniform(60, 160, (68, 2)).astype(np.float32)
    for seed in range(5):
        image = np.zeros((224, 224, 3), np.uint8)
        x, y = landmarks[30]
        cv2.circle(image, (round(float(x)), round(float(y))), 6, (255, 255, 255), cv2.FILLED)
        transform = TrainTransform(augment="field")
        masks = draw_region_masks(landmarks, (224, 224), 14)
        made, moved, drawn = transform(image, landmarks, masks, np.random.default_rng(seed))
        assert made.shape == image.shape and made.dtype == np.uint8
        bright = np.argwhere(made[..., 0] > made[..., 0].max() // 2).mean(axis=0)[::-1]
        assert np.abs(bright - moved).min(axis=0).max() < 4 and not np.allclose(moved, landmarks)
        np.testing.assert_array_equal(drawn, draw_region_masks(moved, (224, 224), 14))
        again = transform(image, landmarks, masks, np.random.default_rng(seed))
        assert all(np.array_equal(one, two) for one, two in zip((made, moved, drawn), again))
