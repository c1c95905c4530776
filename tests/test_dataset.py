"""dataset.py: the masks, the mirror, the schema, and reading in any process."""

import sys

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset import (
    FOUND_BY,
    MASK_STYLES,
    MIRROR_LANDMARKS,
    PER_SAMPLE,
    REGIONS,
    FaceDataset,
    FeatureFileError,
    FeatureWriter,
    TrainTransform,
    draw_region_masks,
    find_feature_files,
    horizontal_flip,
    normalize,
    open_features,
)  # fmt: skip


def mean_face(side: int = 224) -> np.ndarray:
    """A schematic symmetric face: (68, 2) in pixels of a square image."""
    jaw = [(112 - 62 * np.cos(np.pi * i / 16), 95 + 85 * np.sin(np.pi * i / 16)) for i in range(17)]
    left_brow = [(62 + 9 * i, 76 - 5 * np.sin(np.pi * i / 4)) for i in range(5)]
    right_brow = [(223 - x, y) for x, y in reversed(left_brow)]
    nose = [(111.5, 90 + 10 * i) for i in range(4)] + [(98 + 6.75 * i, 128 + 4 * np.sin(np.pi * i / 4)) for i in range(5)]
    left_eye = [(70, 92), (76, 88), (84, 88), (90, 92), (84, 95), (76, 95)]
    right_eye = [(223 - x, y) for x, y in (left_eye[i] for i in (3, 2, 1, 0, 5, 4))]
    outer = [(86, 150), (94, 145), (104, 142), (111.5, 144), (119, 142), (129, 145), (137, 150), (129, 158), (119, 162), (111.5, 163), (104, 162), (94, 158)]
    inner = [(90, 150), (104, 148), (111.5, 149), (119, 148), (133, 150), (119, 154), (111.5, 155), (104, 154)]
    return np.array(jaw + left_brow + right_brow + nose + left_eye + right_eye + outer + inner, np.float32) * (side / 224)


# ------------------------------------------------------------------------------------------------------------------- masks


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


def test_landmarks_outside_the_image_and_broken_ones():
    masks = draw_region_masks(mean_face() + 500, (224, 224), 14)
    assert not masks.any()
    for broken in (np.full((68, 2), np.nan), np.zeros((5, 2))):
        with pytest.raises(ValueError, match="landmarks"):
            draw_region_masks(broken, (224, 224), 14)
    with pytest.raises(ValueError, match="mask style"):
        draw_region_masks(mean_face(), (224, 224), 14, "hull")


# ------------------------------------------------------------------------------------------------------------------ mirror


def test_mirror_is_its_own_inverse_and_keeps_region_members():
    assert (MIRROR_LANDMARKS[MIRROR_LANDMARKS] == np.arange(68)).all()
    for region, members in REGIONS.items():
        mirrored = {"left_eye": "right_eye", "right_eye": "left_eye"}.get(region, region)
        assert set(MIRROR_LANDMARKS[list(members)]) == set(REGIONS[mirrored])


@pytest.mark.parametrize("style", MASK_STYLES)
def test_flipped_masks_are_the_masks_of_flipped_landmarks(style):
    landmarks = mean_face() + np.array([9, 4], np.float32)  # off the middle, so that a flip moves something
    landmarks[36:42, 1] -= 8  # and one eye above the other, so that a swap shows
    masks = torch.from_numpy(draw_region_masks(landmarks, (224, 224), 14, style))
    image = torch.arange(3 * 224 * 224).view(3, 224, 224).to(torch.uint8)
    flipped_image, flipped_landmarks, flipped_masks = horizontal_flip(image, torch.from_numpy(landmarks), masks)
    assert torch.equal(flipped_image, image.flip(-1))
    np.testing.assert_allclose(draw_region_masks(flipped_landmarks.numpy(), (224, 224), 14, style), flipped_masks, atol=0.03)
    again = horizontal_flip(flipped_image, flipped_landmarks, flipped_masks)
    assert torch.equal(again[0], image) and torch.allclose(again[1], torch.from_numpy(landmarks)) and torch.equal(again[2], masks)


# ------------------------------------------------------------------------------------------------------------------ schema


def write_file(path, count: int, label: int = 0, side: int = 32, fail_after: int | None = None) -> None:
    rng = np.random.default_rng(count)
    with FeatureWriter(path, side, side // 16, {"data_set": "real/X"}) as writer:
        for i in range(count):
            if i == fail_after:
                raise RuntimeError("the power is gone")
            writer.append(
                images=rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8), landmarks=mean_face(side)[None] + i,
                region_masks=np.full((1, 8, side // 16, side // 16), i / count), labels=[label], paths=[f"real/X/{i}.png"], found_by=[0],
                sha256=rng.integers(0, 256, (1, 32), dtype=np.uint8),
            )  # fmt: skip


def test_schema_is_as_documented(tmp_path):
    write_file(tmp_path / "a.h5", 5)
    with h5py.File(tmp_path / "a.h5") as file:
        assert {name: (file[name].shape, file[name].dtype.kind) for name in ("images", "landmarks", "region_masks", "labels", "sha256")} == {
            "images": ((5, 32, 32, 3), "u"), "landmarks": ((5, 68, 2), "f"), "region_masks": ((5, 8, 2, 2), "f"), "labels": ((5,), "u"), "sha256": ((5, 32), "u"),
        }  # fmt: skip
        assert file["images"].chunks == (1, 32, 32, 3)
        assert file["paths"].asstr()[3] == "real/X/3.png"
        assert h5py.check_enum_dtype(file["found_by"].dtype) == {name: code for code, name in enumerate(FOUND_BY)}
        assert list(file.attrs["regions"]) == list(REGIONS)


def test_a_file_that_was_not_finished_is_not_there(tmp_path):
    with pytest.raises(RuntimeError):
        write_file(tmp_path / "a.h5", 5, fail_after=3)
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
    [(spoil_version, "schema 99"), (spoil_foreign, "not a feature file"), (spoil_half, "cut off"), (spoil_missing, "has no landmarks"), (None, "no such file")],
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


# ----------------------------------------------------------------------------------------------------------------- reading


def two_files(tmp_path) -> list:
    paths = [tmp_path / "a.h5", tmp_path / "empty.h5", tmp_path / "b.h5"]
    for path, count, label in zip(paths, (5, 0, 3), (0, 1, 1)):
        write_file(path, count, label)
    return paths


def test_samples_run_through_all_files(tmp_path):
    dataset = FaceDataset(two_files(tmp_path), grid_size=2)
    assert len(dataset) == 8 and dataset.labels.tolist() == [0] * 5 + [1] * 3
    assert list(dataset.column("paths")) == [f"real/X/{i}.png" for i in (*range(5), *range(3))]
    with h5py.File(tmp_path / "b.h5") as file:
        sample = dataset[6]
        assert torch.equal(sample["image"], torch.from_numpy(file["images"][1]).permute(2, 0, 1)) and sample["label"] == 1
        np.testing.assert_array_equal(sample["region_masks"], file["region_masks"][1])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same_after_the_parent_has_read(tmp_path, context):
    dataset = FaceDataset(two_files(tmp_path), grid_size=2, transform=TrainTransform(), seed=3)
    here = torch.stack([dataset[i]["image"] for i in range(8)])  # the parent's files are open now
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=context)
    assert torch.equal(torch.cat([batch["image"] for batch in loader]), here)


def test_a_file_is_opened_once_in_each_process(tmp_path, monkeypatch):
    dataset, opened = FaceDataset(two_files(tmp_path), grid_size=2), []
    monkeypatch.setattr(sys.modules["dataset"], "open_features", lambda path: opened.append(path) or open_features(path))
    for i in (0, 6, 1, 7, 2):
        dataset[i]
    assert len(opened) == 2
    dataset._owner = -1  # as it looks to a forked worker
    for i in (0, 6, 1):
        dataset[i]
    assert len(opened) == 4, "handles of the parent are not used"


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
    landmarks = FaceDataset(paths, grid_size=2)[1]["landmarks"].numpy()
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


def test_append_wants_all_columns(tmp_path):
    with pytest.raises(ValueError, match=PER_SAMPLE[0]), FeatureWriter(tmp_path / "a.h5", 32, 2, {}) as writer:
        writer.append(labels=[1])


# -------------------------------------------------------------------------------------------------------------- transforms


def test_transforms_are_drawn_afresh_every_epoch_and_by_nothing_else(tmp_path):
    write_file(tmp_path / "a.h5", 40)
    dataset = FaceDataset([tmp_path / "a.h5"], 2, transform=TrainTransform(), seed=1)

    def epoch(number: int) -> torch.Tensor:
        dataset.set_epoch(number)
        return torch.stack([dataset[i]["image"] for i in range(40)])

    first, second = epoch(1), epoch(2)
    torch.manual_seed(99)  # the state of the process's generator is of no matter, and is left alone
    before = torch.get_rng_state()
    assert torch.equal(epoch(1), first) and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_corruption_has_its_probability_and_range():
    """Measured on a flat gray image with one edge: noise spreads values, blur softens the edge, JPEG rings at it."""
    image = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    image[:, :, 36:] = 140  # not at a multiple of 8, where JPEG's blocks would keep it as it is
    transform, drawn, spreads, flips = TrainTransform(), [], [], []
    torch.manual_seed(0)
    masks, landmarks = torch.zeros(8, 4, 4), torch.zeros(68, 2)
    for _ in range(600):
        result = transform(image, landmarks, masks)[0].float()
        assert result.shape == image.shape
        left_is_dark = result[:, :, :12].mean() < 120
        result = result if left_is_dark else result.flip(-1)
        flips.append(not left_is_dark)
        drawn.append(not torch.equal(result, image.float()))
        spread = result[:, :, :12].std().item() / 255
        if spread > 0.03:
            spreads.append(spread)
    assert 0.43 < np.mean(flips) < 0.57
    assert 0.21 < np.mean(drawn) < 0.33  # 1 − 0.9³ = 0.27
    assert 0.02 < len(spreads) / 600 < 0.12 and 0.1 < max(spreads) < 0.26

    noise, jpeg, blur = transform.corrupt.transforms
    assert [step.p for step in (noise, jpeg, blur)] == [0.1] * 3
    assert noise.transforms[0].sigma_range == (0.05, 0.25)
    assert tuple(jpeg.transforms[0].quality) == (50, 90) and tuple(blur.transforms[0].sigma) == (1.0, 5.0)


def test_normalize_is_imagenets():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    low, high = normalize(images)
    torch.testing.assert_close(low[:, 0, 0], -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225]))
    torch.testing.assert_close((high - low)[:, 0, 0], 1 / torch.tensor([0.229, 0.224, 0.225]))
