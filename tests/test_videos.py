"""Videos in inference.py --images: a row for each face in each frame, one for each face that is followed."""

import csv
import io
import os
import wave
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import error_line, run_script
from PIL import Image

from drawing.face import sample_face
from drawing.render import render
from faces.images import video_of
from faces.rejection import Rejected
from faces.videos import NO_FRAME, NO_STREAM, follow, sample_frames
from samples.feature_files import SPLITS, open_features
from samples.sources import Source
from samples.splits import groups_of

SIZE = (640, 360)
CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".avi": "MJPG", ".mkv": "MJPG"}


def frame_of(i: int, faces: bool = True) -> np.ndarray:
    """(360, 640, 3) RGB: its number as a row of white and black squares, and two faces, one of which moves."""
    picture = np.full((SIZE[1], SIZE[0], 3), 110, np.uint8)
    for bit in range(10):
        picture[340:356, 20 * bit : 20 * bit + 16] = 255 * (i >> bit & 1)
    if faces:
        for seed, left in ((1, 10), (2, 330 + i)):
            picture[20:270, left : left + 250] = render(sample_face(np.random.default_rng(seed)), 250)
    return picture


def number_in(image: Image.Image) -> int:
    pixels = np.asarray(image.convert("L"))
    return sum(int(pixels[348, 20 * bit + 8] > 127) << bit for bit in range(10))


def film(path: Path, frames: int, faces: bool = True) -> Path:
    if path.suffix == ".gif":
        first, *others = [Image.fromarray(frame_of(i, faces)) for i in range(frames)]
        first.save(path, save_all=True, append_images=others, duration=100)
        return path
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*CODECS[path.suffix]), 10, SIZE)
    assert writer.isOpened(), path.suffix
    for i in range(frames):
        writer.write(np.ascontiguousarray(frame_of(i, faces)[..., ::-1]))
    writer.release()
    return path


def cut_off(source: Path, target: Path, share: float) -> Path:
    content = source.read_bytes()
    target.write_bytes(content[: int(share * len(content))])
    return target


def rows_of(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


# --------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("suffix", [*CODECS, ".gif"])
def test_frames_are_evenly_spread_and_what_they_say(tmp_path, suffix):
    path = film(tmp_path / f"clip{suffix}", 40, faces=False)
    frames = list(sample_frames(path, 8))
    assert [frame.number for frame in frames] == [2, 7, 12, 17, 22, 27, 32, 37]
    assert [number_in(frame.image) for frame in frames] == [2, 7, 12, 17, 22, 27, 32, 37]
    assert frames[3].seconds == pytest.approx(1.7, abs=0.11) and frames[0].image.size == SIZE
    assert [frame.number for frame in sample_frames(path, 100)] == list(range(40)), "all of a short one"


def test_far_frames_are_sought(tmp_path):
    path = film(tmp_path / "long.avi", 900, faces=False)
    assert [number_in(frame.image) for frame in sample_frames(path, 2)] == [225, 675]


@pytest.mark.parametrize("slow_first", [False, True])
def test_frames_of_a_video_whose_rate_changes_are_in_order_and_spread_over_its_time(tmp_path, slow_first):
    """Seconds of a frame are those at which it is shown; far frames are not where the mean rate has them."""
    milliseconds = [20] * 400 + [500] * 200
    milliseconds = milliseconds[::-1] if slow_first else milliseconds
    bits = [[255 * (i >> bit & 1) for bit in range(10)] for i in range(600)]
    first, *others = [
        Image.fromarray(np.array([row], np.uint8)).resize((80, 8), Image.Resampling.NEAREST) for row in bits
    ]
    first.save(tmp_path / "odd.gif", save_all=True, append_images=others, duration=milliseconds)
    shown = np.cumsum([0, *milliseconds]) / 1000
    for count in (2, 12):
        frames = list(sample_frames(tmp_path / "odd.gif", count))
        numbers = [
            sum(int(np.asarray(frame.image)[4, 8 * bit + 4, 0] > 127) << bit for bit in range(10)) for frame in frames
        ]
        assert numbers == sorted(set(numbers)) and len(numbers) == count
        np.testing.assert_allclose([frame.seconds for frame in frames], shown[numbers], atol=0.011)
        wanted = shown[-1] * (np.arange(count) + 0.5) / count  # two frames are sought, twelve read
        np.testing.assert_allclose([frame.seconds for frame in frames], wanted, atol=0.6)


class Film:
    """In the place of a capture: a seek lands later than it should, as OpenCV's does where a video has few frames."""

    def __init__(self, times: list[float], late: float):
        self.times, self.late, self.next = times, late, 0

    def get(self, what: int) -> float:
        of_film = {
            cv2.CAP_PROP_FRAME_COUNT: len(self.times),
            cv2.CAP_PROP_FPS: len(self.times) / self.times[-1],
            cv2.CAP_PROP_POS_MSEC: 1000 * self.times[self.next - 1],
        }
        return of_film[what]

    def set(self, what: int, milliseconds: float) -> None:
        late = self.late if 100 < milliseconds / 1000 < self.times[-1] - 60 else 0.0
        self.next = int(np.searchsorted(self.times, milliseconds / 1000 + late - 1e-6))

    def grab(self) -> bool:
        self.next += 1
        return self.next <= len(self.times)

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, np.zeros((2, 2, 3), np.uint8)


@pytest.mark.parametrize("late", [0.0, 7.0, 20.0])
@pytest.mark.parametrize("count", [2, 3, 4, 6, 11])
def test_frames_that_are_not_where_they_are_sought_are_found_by_reading(monkeypatch, count, late):
    times = [*np.arange(2000) / 30, *(67 + np.arange(300.0)), *(367 + np.arange(2000) / 30)]
    monkeypatch.setattr("faces.videos.open_video", lambda path: Film(times, late))
    frames = list(sample_frames(Path("odd.mkv"), count))
    seconds = [frame.seconds for frame in frames]
    assert len(frames) == count and len({frame.number for frame in frames}) == count
    np.testing.assert_allclose(seconds, times[-1] * (np.arange(count) + 0.5) / count, atol=1.1)


def test_frames_of_more_pixels_than_a_picture_may_have_are_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("faces.videos.MOST_PIXELS", SIZE[0] * SIZE[1] - 1)
    with pytest.raises(Rejected, match="frames of 640x360 pixels, more than the"):
        list(sample_frames(film(tmp_path / "large.avi", 2, faces=False), 2))


def test_a_video_that_is_cut_off_is_used_as_far_as_it_goes(tmp_path):
    whole = film(tmp_path / "whole.avi", 60, faces=False)
    frames = list(sample_frames(cut_off(whole, tmp_path / "cut.avi", 0.5), 6))
    assert len(frames) >= 5 and all(number_in(frame.image) == frame.number for frame in frames)
    assert 20 < frames[-1].number < 31


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mkv").touch()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    (tmp_path / "sound.wav").rename(tmp_path / "sound.mov")
    cut_off(film(tmp_path / "whole.mp4", 20, faces=False), tmp_path / "cut.mp4", 0.5)  # its index is at the end
    for name in ("text.mp4", "empty.mkv", "sound.mov", "cut.mp4"):
        with pytest.raises(Rejected) as error:
            list(sample_frames(tmp_path / name, 4))
        assert str(error.value) in (NO_STREAM, NO_FRAME), name


def test_files_that_would_hang_or_crash_are_named(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    odd = tmp_path / os.fsdecode(b"\xff.mp4")
    odd.write_bytes(b"?")
    for path, reason in ((tmp_path / "pipe.mp4", "not a file"), (tmp_path / "list.mp4", NO_STREAM), (odd, "no text")):
        with pytest.raises(Rejected, match=reason):
            list(sample_frames(path, 4))
    film(tmp_path / "take:1.avi", 4, faces=False)
    monkeypatch.chdir(tmp_path)
    assert len(list(sample_frames(Path("take:1.avi"), 4))) == 4


def test_frames_of_a_video_in_capitals_share_a_group():
    paths = [f"real/A/IMG_1.MOV.frame{i:06}.png" for i in range(2)] + ["real/A/IMG_1.png"]
    paths += [f"real/A/two\nlines.mp4.frame{i:06}.png" for i in range(2)]
    groups = groups_of([Source("real/A", path, (0, 0)) for path in paths], by_folder=False)
    assert groups[:3] == [(None, None, "real/A/IMG_1.MOV")] * 2 + [(None, None, None)]
    assert groups[3:] == [(None, None, "real/A/two\nlines.mp4")] * 2
    assert video_of(Path("out/IMG_1.MOV.frame000001.png")) == Path("out/IMG_1.MOV")


def test_faces_are_followed():
    def face(x: float, y: float, size: float = 40) -> tuple:
        points = np.random.default_rng(0).uniform(0, size, (68, 2)) + [x, y]
        return (int(x), int(y), int(x + size), int(y + size)), points

    still, moving = [face(0, 0)] * 4, [face(100 + 12 * i, 50) for i in range(4)]
    frames = [[still[0], moving[0]], [moving[1], still[1]], [still[2]], [face(300, 300), still[3], moving[3]]]
    assert follow(frames) == [[0, 1], [1, 0], [0], [2, 0, 1]]
    assert follow([[face(0, 0)], [face(0, 0, 200)], []]) == [[0], [1], []], "another size is another face"


# ------------------------------------------------------------------------------------------------------ whole commands


@pytest.mark.slow
def test_frames_are_images_of_one_split(tmp_path):
    for kind, name in (("real", "A"), ("fake", "B")):
        (tmp_path / "raw" / kind / name / "sub").mkdir(parents=True)
        for i in range(3):
            film(tmp_path / "raw" / kind / name / f"sub/{i}.mp4", 12 + i)
        (tmp_path / "raw" / kind / name / "torn.mov").write_bytes(bytes(100))
        Image.fromarray(frame_of(3)).save(tmp_path / "raw" / kind / name / "photo.jpg")
        options = ("--directory", f"raw/{kind}/{name}", "--output_dir", f"data/{kind}/{name}", "--frames", 3)
        done = run_script("preprocess.py", *options, "--align", cwd=tmp_path)
        assert "10 written, 0 unchanged, 1 rejected" in done.stdout and f"torn.mov: {NO_STREAM}" in done.stdout
        done = run_script("preprocess.py", *options, "--align", cwd=tmp_path)
        assert "0 written, 10 unchanged, 1 rejected" in done.stdout and "WARNING: " not in done.stdout.split("\n")[0]
    names = sorted(path.name for path in (tmp_path / "data/real/A/sub").iterdir())
    assert names[:3] == ["0.mp4.frame000002.png", "0.mp4.frame000006.png", "0.mp4.frame000010.png"]
    run_script("feature_extraction.py", "--data_root", "data", "--workers", 1, cwd=tmp_path)
    split_of = {}
    for split in SPLITS:
        for path in (tmp_path / "features").glob(f"*/*/{split}_features.h5"):
            with open_features(path) as file:
                split_of |= dict.fromkeys(file["paths"].asstr()[:], split)
    assert len(split_of) == 20
    for video in {path.split(".frame")[0] for path in split_of if ".frame" in path}:
        assert len({split for path, split in split_of.items() if path.startswith(video)}) == 1


def test_videos_stay_where_images_are_replaced(tmp_path):
    (tmp_path / "D").mkdir()
    film(tmp_path / "D/clip.mp4", 5, faces=False)
    Image.fromarray(frame_of(3)).save(tmp_path / "D/photo.jpg")
    done = run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
    assert "a video, of whose frames --output_dir makes images" in (tmp_path / "D_rejected/rejected.csv").read_text()
    assert "1 written" in done.stdout and sorted(path.name for path in (tmp_path / "D").iterdir()) == [
        "clip.mp4",
        "photo.png",
    ]


@pytest.mark.slow
def test_frames_without_a_face_are_counted_and_names_of_frames_are_taken(tmp_path):
    (tmp_path / "D").mkdir()
    frames = [frame_of(i, faces=i < 3) for i in range(6)]
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(tmp_path / "D/clip.gif", save_all=True, append_images=others, duration=100)
    options = ("--directory", "D", "--output_dir", "O", "--frames", 6, "--align", "--without_cnn")
    assert "3 frames of videos" in run_script("preprocess.py", *options, cwd=tmp_path).stdout
    Image.fromarray(frames[0]).save(tmp_path / "D/clip.gif.frame000000.png")
    refused = run_script("preprocess.py", *options, cwd=tmp_path, expect=1)
    assert "clip.gif.frame000000.png: has the name that a frame of clip.gif" in error_line(refused)
    (tmp_path / "D/clip.gif.frame000000.png").rename(tmp_path / "D/clip.gif.frame000000.jpg")  # whose PNG has it
    refused = run_script("preprocess.py", *options, cwd=tmp_path, expect=1)
    assert "clip.gif.frame000000.jpg: has the name that a frame of clip.gif" in error_line(refused)


@pytest.mark.slow
def test_rows_of_frames_and_of_faces(trained, tmp_path):
    film(tmp_path / "clip.mp4", 30)
    film(tmp_path / "nobody.avi", 5, faces=False)
    (tmp_path / "hostile.webm").write_bytes(bytes(1000))
    Image.fromarray(render(sample_face(np.random.default_rng(3)), 300)).save(tmp_path / "photo.png")
    (tmp_path / "notes.txt").write_text("no video")
    options = ("--checkpoint", trained / "best_model.pth", "--images", tmp_path, "--frames", 5, "--workers", 1)
    options += ("--without_cnn",)
    done = run_script("inference.py", *options, cwd=tmp_path, expect=3)
    rows = {
        name: [row for row in rows_of(done.stdout) if row["path"].endswith(name)]
        for name in ("clip.mp4", "nobody.avi", "hostile.webm", "photo.png", "notes.txt")
    }
    assert sum(map(len, rows.values())) == len(rows_of(done.stdout))
    of_frames = [row for row in rows["clip.mp4"] if not row["frames"]]
    assert [int(row["frame"]) for row in of_frames] == [i for i in (3, 9, 15, 21, 27) for _ in range(2)]
    of_faces = [row for row in rows["clip.mp4"] if row["frames"]]
    assert [(row["number"], row["frames"]) for row in of_faces] == [("0", "5"), ("1", "5")]
    for row in of_faces:
        scores = [float(one["probability"]) for one in of_frames if one["number"] == row["number"]]
        assert float(row["probability"]) == pytest.approx(np.mean(scores))
        assert float(row["spread"]) == pytest.approx(np.std(scores)) and row["verdict"] in ("real", "fake")
        lefts = [int(one["left"]) for one in of_frames if one["number"] == row["number"]]
        assert np.ptp(lefts) < 30 and (np.diff(lefts) >= -2).all(), "one stands, one moves 24 pixels to the right"
    assert [row["reason"] for name in ("nobody.avi", "hostile.webm") for row in rows[name]] == [
        "no face found",
        NO_STREAM,
    ]
    (photo,) = rows["photo.png"]
    assert photo["verdict"] and not photo["frame"] and not photo["frames"]
    assert "left alone" in rows["notes.txt"][0]["reason"] and "faces: " in done.stderr
    again = run_script("inference.py", *options, cwd=tmp_path, expect=3)
    assert again.stdout == done.stdout
