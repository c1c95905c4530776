"""The page and POST /score: answers, refusals, and that nothing of a picture stays behind."""

import asyncio
import csv
import io
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from conftest import ROOT, decompression_bomb, error_line, picture, run_script
from PIL import Image

pytest.importorskip("gradio", reason="without requirements-app.txt")
requests = pytest.importorskip("requests", reason="without requirements-app.txt")

import app  # noqa: E402
from drawing.render import draw_face  # noqa: E402
from evaluation.operating import describe_verdict  # noqa: E402
from runtime.card import LIMITS, limits_of  # noqa: E402
from runtime.weights_file import SHIPPED  # noqa: E402
from serving import desk as desk_module  # noqa: E402
from serving.desk import Desk, Kept, Refused, sweep  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MEGABYTES, WAITING = 2, 3


class Served(NamedTuple):
    url: str
    desk: Desk
    uploads: Path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    Image.fromarray(draw_face(rng, None, 300)).save(folder / "one.png")
    group = Image.new("RGB", (1000, 460), "gray")
    for i, generator in enumerate((None, "IrisMismatch")):
        group.paste(Image.fromarray(draw_face(rng, generator, 400)), (30 + 500 * i, 30))
    group.save(folder / "group.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory) -> Served:
    """app.py's server, in a thread of this process."""
    import uvicorn

    options = ("--checkpoint", trained / "best_model.pth", "--device", "cpu")
    bounds = ("--megabytes", MEGABYTES, "--waiting", WAITING)
    folder = tmp_path_factory.mktemp("served")
    made, desk = app.make_app(app.get_args_parser().parse_args([str(part) for part in options + bounds]), folder)
    server = uvicorn.Server(uvicorn.Config(made, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Served(f"http://127.0.0.1:{port}", desk, folder / "uploads")
    server.should_exit = True
    thread.join()


def left_over(served: Served) -> list[Path]:
    """Gradio has an empty folder of its own there."""
    return [path for path in served.uploads.rglob("*") if path.is_file()]


def test_a_picture_has_the_rows_of_inference(served, trained, pictures, tmp_path):
    names = ("one.png", "group.jpg")
    checkpoint = ("--checkpoint", trained / "best_model.pth", "--device", "cpu")
    paths = [pictures / name for name in names]
    run_script("inference.py", *checkpoint, "--output", "rows.csv", "--workers", 1, "--images", *paths, cwd=tmp_path)
    with open(tmp_path / "rows.csv", newline="") as file:
        expected = list(csv.DictReader(file))
    rows = []
    for path in paths:
        answer = requests.post(f"{served.url}/score", files={"file": (path.name, path.read_bytes())})
        assert answer.status_code == 200
        rows += answer.json()["rows"]
    assert [row["path"] for row in rows] == [Path(row["path"]).name for row in expected]
    assert list(rows[0]) == list(expected[0])
    for row, wanted in zip(rows, expected, strict=True):
        assert row["probability"] == pytest.approx(float(wanted["probability"]), abs=1e-6)
        assert [str(row[name]) for name in ("left", "bottom", "verdict")] == [
            wanted[name] for name in ("left", "bottom", "verdict")
        ]
    assert left_over(served) == []


def jpeg() -> bytes:
    stream = io.BytesIO()
    picture(300, 200).save(stream, "JPEG")
    return stream.getvalue()


def form(name: str, content: bytes, field: str = "file") -> dict:
    return {"files": {field: (name, content)}}


def gif(width: int, height: int) -> bytes:
    """One of 35 bytes, whose only frame has a pixel."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return b"GIF89a" + screen + b",\0\0\0\0\1\0\1\0\0" + b"\2\2\x44\1\0" + b";"


def motion_jpeg(width: int, height: int) -> bytes:
    """An AVI with a frame of so many black pixels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.avi")
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (width, height))
        writer.write(np.zeros((height, width, 3), np.uint8))
        writer.release()
        return path.read_bytes()


HOSTILE = {
    "empty": (form("a.jpg", b""), 422, "The file is empty."),
    "text": (form("a.jpg", b"no picture " * 50), 422, "is no JPEG"),
    "cut off": (form("a.jpg", jpeg()[:3000]), 422, "cut off"),
    "without a face": (form("a.jpg", jpeg()), 422, "No face was found in it."),
    "bomb": (form("a.png", decompression_bomb(20000, 20000)), 413, "megapixels"),
    "smaller bomb": (form("a.png", decompression_bomb(12000, 12000)), 413, "144 megapixels"),
    "bomb within the bounds": (form("a.png", decompression_bomb(9000, 9000)), 422, "cut off"),
    "PostScript": (form("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), 422, "is no JPEG"),
    "playlist": (form("a.mp4", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/x.ts\n"), 422, "none of MP4"),
    "no video": (form("a.mp4", b"\0\0\0\x18ftypmp42" + bytes(900)), 422, "no video stream"),
    "GIF with a large screen": (form("a.gif", gif(12000, 12000)), 413, "144 megapixels, more than the 40"),
    "such a GIF as a film": (form("a.mp4", gif(12000, 12000)), 413, "144 megapixels, more than the 40"),
    "such a GIF as a photo": (form("a.png", gif(12000, 12000)), 413, "144 megapixels"),
    "GIF within the bounds": (form("a.gif", gif(600, 600)), 422, "No face was found"),
    "GIF cut off": (form("a.gif", b"GIF89a"), 422, "cannot be read"),
    "film with large frames": (form("a.avi", motion_jpeg(8000, 6000)), 413, "48 megapixels, more than the 40"),
    "name with folders": (form("../../../etc/passwd", b"x"), 422, "is no JPEG"),
    "other field": (form("a.jpg", jpeg(), "picture"), 400, "no such file"),
    "too large": (form("a.jpg", bytes((MEGABYTES + 1) * 2**20)), 413, f"larger than {MEGABYTES} MB"),
    "far too large": (form("a.jpg", bytes(10 * MEGABYTES * 2**20)), 413, f"larger than {MEGABYTES} MB"),
    "no form": ({"data": jpeg()}, 415, "curl -F file=@photo.jpg"),
    "JSON": ({"json": {"file": "a.jpg"}}, 415, "curl -F file=@photo.jpg"),
    "two files": ({"files": [("file", ("a.jpg", jpeg())), ("file", ("b.jpg", jpeg()))]}, 400, "Too many files"),
    "garbage": (
        {"data": b"garbage", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        400,
        "cannot be read",
    ),
    "no boundary": ({"data": b"garbage", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_body_gets_a_sentence(served, kind):
    request, status, words = HOSTILE[kind]
    if kind == "far too large":  # more than is read to the end: the answer, or a connection that is closed
        try:
            answer = requests.post(f"{served.url}/score", **request)
        except requests.ConnectionError:
            answer = None
    else:
        answer = requests.post(f"{served.url}/score", **request)
    if answer is not None:
        assert (answer.status_code, list(answer.json())) == (status, ["detail"])
        assert words in answer.json()["detail"] and answer.json()["detail"][0].isupper()
    assert left_over(served) == []


@pytest.mark.parametrize("charset", ["unicode_escape", "raw_unicode_escape", "utf-7", "undefined", "idna", "hex", "no"])
@pytest.mark.parametrize("name", [b"\\ud800.png", b"+2AA-.png", b"\xff\xfe.png"])
def test_a_name_in_any_charset_is_no_error_of_the_server(served, pictures, charset, name):
    part = b'--BB\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n--BB--\r\n'
    kind = {"content-type": f"multipart/form-data; boundary=BB; charset={charset}"}
    body = part % (name, (pictures / "one.png").read_bytes())
    answer = requests.post(f"{served.url}/score", data=body, headers=kind)
    if answer.status_code == 200:
        assert answer.json()["rows"][0]["path"].endswith(".png")
    else:
        assert answer.status_code == 400 and "cannot be read" in answer.json()["detail"]
    assert left_over(served) == []


def send_head(served: Served, address: str = "/score") -> socket.socket:
    """A connection on which a request has begun, and does not go on."""
    host, port = served.url.removeprefix("http://").split(":")
    head = f"POST {address} HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    connection = socket.create_connection((host, int(port)), timeout=20)
    part = '--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
    connection.sendall(f"{head}Content-Length: 99999\r\n\r\n{part}".encode())
    return connection


def wait_for_arrivals(served: Served, free: int) -> None:
    deadline = time.monotonic() + 10
    while served.desk._free_arrivals._value != free and time.monotonic() < deadline:
        time.sleep(0.02)
    assert served.desk._free_arrivals._value == free


ARRIVALS = WAITING + desk_module.MORE_ARRIVING


def test_a_sender_who_hangs_up_leaves_nothing(served):
    with send_head(served):
        wait_for_arrivals(served, ARRIVALS - 1)
    wait_for_arrivals(served, ARRIVALS)
    assert served.desk._free._value == WAITING and left_over(served) == []


def test_who_is_slow_to_send_takes_nobodys_place(served, pictures, monkeypatch):
    from serving import score

    good = form("one.png", (pictures / "one.png").read_bytes())
    monkeypatch.setattr(score, "SILENT_SECONDS", 4)
    silent = [send_head(served) for _ in range(desk_module.MORE_ARRIVING)]
    wait_for_arrivals(served, WAITING)
    assert served.desk._free._value == WAITING
    assert requests.post(f"{served.url}/score", **good).status_code == 200
    silent += [send_head(served) for _ in range(WAITING)]
    wait_for_arrivals(served, 0)
    monkeypatch.setattr(score, "SILENT_SECONDS", 0.2)  # for those that come now
    refused = requests.post(f"{served.url}/score", **good)
    assert refused.status_code == 503 and refused.headers["Retry-After"] and "arriving" in refused.json()["detail"]
    for connection in silent:
        with connection:
            assert connection.recv(99).startswith(b"HTTP/1.1 408 ")
    wait_for_arrivals(served, ARRIVALS)
    assert requests.post(f"{served.url}/score", **good).status_code == 200


def test_a_request_that_drips_ends(served, monkeypatch):
    from serving import score

    monkeypatch.setattr(score, "SECONDS", 1 - MEGABYTES)
    begun = time.monotonic()
    with send_head(served) as connection:
        connection.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() < begun + 10:
            connection.sendall(b"x")
            try:
                answer = connection.recv(99)
            except TimeoutError:
                pass
    assert answer.startswith(b"HTTP/1.1 408 ")
    wait_for_arrivals(served, ARRIVALS)


def test_when_all_places_are_taken_it_says_so(served, pictures):
    content, go_on, codes = (pictures / "one.png").read_bytes(), threading.Event(), []
    busy = threading.Thread(target=served.desk.run, args=(go_on.wait,))
    busy.start()

    def send() -> None:
        codes.append(requests.post(f"{served.url}/score", **form("one.png", content)).status_code)

    senders = [threading.Thread(target=send) for _ in range(WAITING)]
    for sender in senders:
        sender.start()
    while served.desk._free._value:
        time.sleep(0.02)
    refused = requests.post(f"{served.url}/score", **form("one.png", content))
    go_on.set()
    for thread in (*senders, busy):
        thread.join()
    assert refused.status_code == 503 and refused.headers["Retry-After"]
    assert f"{WAITING} pictures are waiting" in refused.json()["detail"]
    assert codes == [200] * WAITING and left_over(served) == []


# ------------------------------------------------------------------------------------------------------------- the page


def test_two_who_hand_in_the_same_picture_do_not_lose_it(served, pictures):
    from serving.page import answer_uploads

    content = (pictures / "group.jpg").read_bytes()
    paths = [
        requests.post(f"{served.url}/gradio_api/upload", files={"files": ("group.jpg", content)}).json()[0]
        for _ in range(2)
    ]
    assert len(set(paths)) == 2 and len(left_over(served)) == 2
    first = answer_uploads(served.desk, served.uploads, [{"path": paths[0], "orig_name": "group.jpg"}])
    assert not Path(paths[0]).exists() and Path(paths[1]).exists()
    second = answer_uploads(served.desk, served.uploads, {"path": paths[1], "orig_name": "group.jpg"})
    assert left_over(served) == []
    thresholds = served.desk.detector.thresholds
    for answer in (first, second):
        for found in re.findall(r'<li class="(\w+)">.*?<small>(\w+ .*?);', answer):
            assert found[1] == describe_verdict(found[0], thresholds), "beside each verdict, its range"
        assert answer.count("<small>") == 2 and "may seem to disagree" in answer
        assert len(re.findall(r'class="box (?:fake|real|uncertain) ', answer)) == 2 and "data:text/csv" in answer


def test_no_other_file_of_the_machine_is_read(served, pictures):
    from serving.page import answer_uploads

    kept = pictures / "one.png"
    (served.uploads / "link.png").symlink_to(kept)
    for path in (str(kept), str(served.uploads / "link.png"), str(served.uploads / ".." / "examples" / "x.png"), None):
        assert "No file has arrived" in answer_uploads(served.desk, served.uploads, [{"path": path}])
    assert kept.exists()
    (served.uploads / "link.png").unlink()


def ask_queue(served: Served, number: int, data: list, event: object = None) -> str:
    """What Gradio's queue answers to a program that calls one of the page's functions."""
    session = secrets.token_hex(8)
    body = {"fn_index": number, "session_hash": session, "event_data": event, "data": data}
    joined = requests.post(f"{served.url}/gradio_api/queue/join", json=body, timeout=20)
    if joined.status_code != 200:
        return joined.text
    told = requests.get(f"{served.url}/gradio_api/queue/data?session_hash={session}", stream=True, timeout=20)
    lines = []
    for line in told.iter_lines(decode_unicode=True):
        lines.append(line)
        if "process_completed" in line or "unexpected_error" in line or "close_stream" in line:
            break
    return "\n".join(lines)


def upload_of(path: Path | str, **more: object) -> dict:
    return {"path": str(path), "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}, **more}


FORMS = {
    "single": lambda upload: upload,
    "list": lambda upload: [upload],
    "nested": lambda upload: {"value": {"of": [upload]}},
    "upload that is a stream": lambda upload: {**upload, "is_stream": True},
    "with an address": lambda upload: {**upload, "url": "http://127.0.0.1:1/x.png"},
}


@pytest.mark.parametrize("shape", FORMS)
def test_a_program_gets_no_file_of_the_machine_through_the_queue(served, pictures, shape):
    secret = pictures / "secret.png"
    secret.write_bytes((pictures / "one.png").read_bytes())
    drawing = pictures / "secret.svg"
    drawing.write_text("<svg/>")
    link, folder_link = served.uploads / "link.png", served.uploads / "folder"
    link.symlink_to(secret)
    folder_link.symlink_to(pictures)
    dots = f"{served.uploads}/../../../{os.path.relpath(secret, served.uploads.parents[2])}"
    paths = (secret, drawing, link, folder_link / "secret.png", dots, served.uploads, "/dev/zero", "a\0b", "x" * 5000)
    numbers = [of["id"] for of in requests.get(f"{served.url}/config").json()["dependencies"]]
    assert len(numbers) > 3
    before = set(left_over(served))
    for number in numbers if shape == "single" else numbers[:3]:
        for path in paths:
            told = ask_queue(served, number, [FORMS[shape](upload_of(path))])
            assert "data:image" not in told and 'class=\\"box' not in told
            assert set(left_over(served)) == before
    for path in (secret, drawing, link):
        assert requests.get(f"{served.url}/gradio_api/file={path}").status_code == 403
    for path in (link, folder_link):
        path.unlink()
    assert requests.get(served.url, timeout=20).status_code == 200 and secret.exists()


EVENTS = (None, [], {}, *({"ask": ask} for ask in (None, {}, [], -1, "-1", "x:y", "a:b:c", 99, "a:-1", "1e9")))


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_what_nobody_can_ask_is_refused_with_a_sentence(served, capfd, event):
    functions = [of for of in requests.get(f"{served.url}/config").json()["dependencies"] if of["targets"][0][0]]
    clicks = [of["id"] for of in functions if of["targets"][0][1] == "click"]
    assert len(clicks) == 2  # an example, a face
    for number in clicks:
        told = ask_queue(served, number, [], event)
        assert '"success":false' in told and 'class=\\"box' not in told
        assert "nothing that can be asked" in told or "no longer here" in told
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["\ud800.png", 7, None, ["x"], "a\0b.png"])
def test_a_name_that_is_no_text_is_no_error_of_the_page(served, pictures, name):
    from serving.page import answer_uploads

    files = {"files": ("one.png", (pictures / "one.png").read_bytes())}
    (path,) = requests.post(f"{served.url}/gradio_api/upload", files=files).json()
    answer = answer_uploads(served.desk, served.uploads, [{"path": path, "orig_name": name}, "no dict"])
    assert "1 face:" in answer and answer.encode() and left_over(served) == []


def test_what_was_handed_in_is_scored_through_the_queue(served, pictures):
    files = {"files": ("one.png", (pictures / "one.png").read_bytes())}
    for number, shape in ((0, "list"), (3, "single")):  # the files, the camera
        (path,) = requests.post(f"{served.url}/gradio_api/upload", files=files).json()
        told = ask_queue(served, number, [FORMS[shape](upload_of(path))])
        assert "1 face:" in told and left_over(served) == []


def hand_in(served: Served, *contents: bytes, **more: object) -> requests.Response:
    files = [("files", (f"{i}.png", content)) for i, content in enumerate(contents)]
    return requests.post(f"{served.url}/gradio_api/upload", files=files, timeout=20, **more)


def test_uploads_are_bounded_in_number(served, monkeypatch):
    refused = hand_in(served, *[b"x"] * 51)
    assert refused.status_code == 400 and "Maximum number of files is 50" in refused.text
    refused = hand_in(served, b"x", data={"field": "x"})
    assert refused.status_code == 400 and "Too many fields" in refused.text and left_over(served) == []
    assert len(hand_in(served, *[b"x"] * 50).json()) == 50
    monkeypatch.setattr(desk_module, "MOST_FILES", 12)  # times WAITING and one: 48
    refused = hand_in(served, b"x")
    assert refused.status_code == 400 and refused.text.startswith("Too many files are waiting")
    sweep(served.uploads, -1)
    assert len(hand_in(served, b"x").json()) == 1, "what is old has gone, and there is room"
    sweep(served.uploads, -1)


def test_uploads_are_bounded_in_bytes(served, pictures, monkeypatch):
    from serving.page import answer_uploads

    monkeypatch.setattr(desk_module, "STORED_ANSWERS", 5 / 100)  # of 50 files of 2 MB
    content = (pictures / "one.png").read_bytes().ljust(MEGABYTES * 2**20, b"\0")
    paths = hand_in(served, content, content).json()
    before = left_over(served)
    refused = hand_in(served, content, content)
    assert refused.status_code == 400 and refused.text.startswith("Too many files are waiting")
    assert left_over(served) == before, "nor is there a part of what was refused"
    assert "2 faces:" in answer_uploads(served.desk, served.uploads, [{"path": path} for path in paths])
    assert len(hand_in(served, content, content).json()) == 2, "what was scored has gone, and there is room"
    sweep(served.uploads, -1)
    assert left_over(served) == []


@pytest.mark.parametrize("way", ["is silent", "hangs up"])
def test_of_an_upload_that_breaks_off_nothing_stays(served, monkeypatch, way):
    from serving import uploads

    monkeypatch.setattr(uploads, "SILENT_SECONDS", 1)
    with send_head(served, "/gradio_api/upload") as connection:
        connection.sendall(b"x" * 5000)
        deadline = time.monotonic() + 10
        while not left_over(served) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert left_over(served)
        if way == "is silent":
            told = connection.recv(999)
            assert told.startswith(b"HTTP/1.1 400 ") and b"1 seconds without a byte" in told + connection.recv(999)
    while left_over(served) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left_over(served) == []


@pytest.mark.parametrize("name", ["component_server", "component_server/", "process_recording"])
def test_no_other_address_takes_files(served, name):
    answer = requests.post(f"{served.url}/gradio_api/{name}", **form("a.mp4", b"x", "video"))
    assert answer.status_code == 404


def test_no_address_is_fetched(tmp_path):
    import gradio as gr

    from serving.page import local_only

    with gr.Blocks():
        file = gr.File()
    local_only(file, tmp_path)
    with pytest.raises(gr.Error, match="no addresses"):
        asyncio.run(file.async_move_resource_to_block_cache("https://127.0.0.1/x.png"))


def test_names_are_text_and_a_bad_file_among_good_ones_is_named(served, pictures, tmp_path):
    from serving.page import answer_files

    (tmp_path / "broken.png").write_bytes((pictures / "one.png").read_bytes()[:5000])
    name = '"><img src=x onerror=alert(1)>.png'
    answer = answer_files(served.desk, [(pictures / "one.png", name), (tmp_path / "broken.png", "broken.png")])
    assert "<img src=x" not in answer and "&lt;img src=x onerror=alert(1)&gt;.png" in answer
    assert "broken.png</h3>" in answer and desk_module.DAMAGED in answer and "1 face:" in answer


def test_faces_are_kept_for_a_click_and_not_for_longer(served, pictures, monkeypatch):
    desk = Desk(served.desk.detector)
    (face,) = served.desk.judge(pictures / "one.png", "one.png").faces
    token = desk.keep([Kept(face, (300, 300))])
    assert desk.take(token, 0).row is face
    for asked in ((token, 1), (token, -1), ("other", 0)):
        with pytest.raises(Refused, match="no longer here"):
            desk.take(*asked)
    monkeypatch.setattr(desk_module, "KEPT_FACES", 3)
    later = [desk.keep([Kept(face, None)] * 2) for _ in range(2)]
    with pytest.raises(Refused):
        desk.take(token, 0)
    assert desk.take(later[1], 1)
    much_later = time.monotonic() + desk_module.KEPT_SECONDS + 1
    monkeypatch.setattr(desk_module, "time", SimpleNamespace(monotonic=lambda: much_later))  # not the server's clock
    desk.forget_old()
    assert not desk._kept


def test_what_was_filled_is_tinted(served, pictures):
    from serving.show import FILL_COLOUR, mark_filled

    (row,) = served.desk.judge(pictures / "one.png", "one.png").faces
    side = row.face.image.shape[0]
    face = row.face._replace(place=row.face.landmarks + [-side / 2, 0], image=np.zeros_like(row.face.image))
    marked = np.asarray(mark_filled(Kept(row._replace(face=face), (side, side))))
    tinted = (marked[..., 0] > 0.4 * FILL_COLOUR[0]).mean(axis=0)
    assert tinted[: side // 2 - 2].min() == 1 and tinted[side // 2 + 2 :].max() == 0


def test_the_page_asks_no_other_host(served):
    page = requests.get(served.url).text
    assert "Photograph, or generated?" in page
    assert re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*', page) == []
    assert "https://fonts" not in page + requests.get(f"{served.url}/theme.css").text


def test_no_list_of_addresses_is_served(served):
    assert [requests.get(f"{served.url}/{name}").status_code for name in ("openapi.json", "docs", "redoc")] == [404] * 3


def test_nothing_is_fetched_from_elsewhere(served):
    for address in ("file=http://example.com/a.png", "file=https%3A//example.com", "proxy=https://example.com"):
        assert requests.get(f"{served.url}/gradio_api/{address}", timeout=5).status_code == 404


def test_limits_are_those_of_the_card(tmp_path):
    assert LIMITS in limits_of(tmp_path / "mine.pth")
    card = tmp_path / "mine.md"
    card.write_text("# Card\n\n## Use\n\nFor this.\n\n## Limits\n\n### Age\n\n- not for that\n\n## Data\n\nThese.\n")
    assert limits_of(tmp_path / "mine.pth") == "**Limits**\n\n**Age**\n\n- not for that"
    for other in ("# Card\n", "# Unlimited faces\n\nAll of them.\n", "## Limits\n"):
        card.write_text(other)
        assert LIMITS in limits_of(tmp_path / "mine.pth")


def test_old_uploads_are_swept(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").touch()
    (tmp_path / "partial").touch()
    for name in ("old", "partial"):
        os.utime(tmp_path / name, (0, 0))
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.slow
def test_the_script_cleans_up_and_says_where_a_model_comes_from(trained, tmp_path):
    if not SHIPPED.exists():  # else `make weights` was run here, and the page would open with these
        refused = run_script("app.py", "--port", 0, cwd=tmp_path, expect=1, processes=0)  # it sets the environment
        assert "no such checkpoint" in error_line(refused) and "run train.py first" in error_line(refused)
    command = [sys.executable, str(ROOT / "app.py"), "--checkpoint", str(trained / "best_model.pth"), "--port", "0"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("http://127.0.0.1:0 judges with")
    (folder,) = tmp_path.glob("lamm_vit_app_*")
    assert len(list((folder / "examples").iterdir())) == 5
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode and not folder.exists()


# Whether it can be shown on the page
PICTURE = """address => new Promise(resolve => {
    const picture = new Image();
    picture.onload = () => resolve(true);
    picture.onerror = () => resolve(false);
    picture.src = address;
})"""
# What forbids to send it
FORM = """address => new Promise(resolve => {
    document.addEventListener('securitypolicyviolation', event => resolve(event.effectiveDirective));
    const form = document.createElement('form');
    form.method = 'post';
    form.action = address;
    document.body.append(form);
    form.submit();
})"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="without Debian's chromium")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_in_a_browser(served, pictures, tmp_path, scheme, width):
    api = pytest.importorskip("playwright.sync_api", reason="without requirements-app.txt")
    large = Image.new("RGB", (6500, 4700), "gray")  # 30 megapixels
    large.paste(Image.open(pictures / "one.png").resize((2400, 2400)), (2000, 1000))
    large.save(tmp_path / "large.jpg")
    (tmp_path / "broken.jpg").write_bytes((pictures / "group.jpg").read_bytes()[:5000])
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        pages, foreign = [], []
        for _ in range(2):
            context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
            page = context.new_page()
            page.set_default_timeout(60000)
            page.on("request", lambda request: foreign.append(request.url))
            page.goto(served.url)
            pages.append(page)
        box = "#files input[type=file]"
        for page, name in zip(pages, ("group.jpg", "one.png")):  # two people at once
            page.wait_for_selector(box, state="attached")
            page.set_input_files(box, str(pictures / name))
        for page, name, faces in zip(pages, ("group.jpg", "one.png"), (2, 1)):
            page.wait_for_selector("#answer .summary")
            assert page.inner_text("#answer h3") == name and page.locator("#answer .box").count() == faces
            assert page.locator("#limits").is_visible()
        page = pages[0]
        page.locator("#answer .box").nth(1).click()
        page.wait_for_selector("#why .explanation")
        page.set_input_files(box, [str(tmp_path / "broken.jpg"), str(tmp_path / "large.jpg")])
        page.wait_for_selector("#answer h3:has-text('large.jpg')")
        assert desk_module.DAMAGED in page.inner_text("#answer") and page.locator("#answer .box").count() == 1
        page.locator("#answer .why").click()
        page.wait_for_selector("#why h3:has-text('large.jpg')")
        elsewhere = served.url.replace("127.0.0.1", "localhost")  # to a browser another host
        assert [page.evaluate(PICTURE, f"{host}/favicon.ico") for host in (served.url, elsewhere)] == [True, False]
        assert page.evaluate(FORM, f"{elsewhere}/score") == "form-action"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
        browser.close()
    assert [url for url in foreign if not url.startswith((served.url, "data:", "blob:"))] == []
    assert left_over(served) == []


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="without Debian's chromium")
def test_a_full_queue_in_a_browser(served, pictures):
    """Who comes too many reads so, where the answer would be, and has the box for files free again."""
    api = pytest.importorskip("playwright.sync_api", reason="without requirements-app.txt")
    go_on = threading.Event()
    busy = threading.Thread(target=served.desk.run, args=(go_on.wait,))
    box = "#files input[type=file]"
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        waiting, refused = [browser.new_context().new_page() for _ in range(2)]
        for page in (waiting, refused):
            page.set_default_timeout(60000)
            page.goto(served.url)
            page.wait_for_selector(box, state="attached")
        busy.start()
        try:
            waiting.set_input_files(box, str(pictures / "one.png"))
            waiting.wait_for_selector("#answer .progress-text:has-text('processing')")
            progress, limits = (waiting.locator(name).bounding_box() for name in ("#answer .progress-text", "#limits"))
            assert progress["y"] + progress["height"] <= limits["y"], "it does not stand over other text"
            for _ in range(WAITING):
                body = {"fn_index": 0, "session_hash": secrets.token_hex(8), "data": [[]]}
                assert requests.post(f"{served.url}/gradio_api/queue/join", json=body, timeout=20).status_code == 200
            refused.set_input_files(box, str(pictures / "one.png"))
            refused.wait_for_selector("#answer .refused:has-text('Try again in a few seconds.')")
            assert not refused.locator("#answer .error").is_visible()
            refused.wait_for_selector("#files button:has-text('Upload')")
            refused.locator("#examples button").first.click()
            refused.wait_for_selector("#answer .refused:has-text('Try again in a few seconds.')")
        finally:
            go_on.set()
            busy.join()
        waiting.wait_for_selector("#answer .summary")
        refused.set_input_files(box, str(pictures / "group.jpg"))
        refused.wait_for_selector("#answer .summary")
        browser.close()
    sweep(served.uploads, -1)  # the picture of whom no answer was given
