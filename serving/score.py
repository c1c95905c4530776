"""POST /score: a picture in, JSON out, with the columns of inference.py's CSV.

    curl -F file=@photo.jpg http://127.0.0.1:7860/score   ->  {"rows": [{"path": "photo.jpg", "verdict": "fake", ...}]}

What has no score is answered with a status from 400 on and {"detail": a sentence}.
"""

import asyncio
import math
import shutil
import tempfile
from pathlib import Path, PurePath

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from faces.images import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from serving.desk import Desk, Refused, as_text, rows_of

# For a request to arrive, and for what is left of one that was refused: one for each MB that is taken beyond these; and
# until its next bytes
SECONDS, SILENT_SECONDS = 20, 15
HOW = 'Send one file in the field "file": curl -F file=@photo.jpg'
FORM_BYTES = 8192  # around the file
NAME_LENGTH = 120


class Bounded:
    """What a request is received by: no more than so many bytes of its body, and no long silence between them."""

    def __init__(self, receive: Receive, most: int, sentence: str):
        self._receive, self.most, self.sentence = receive, most, sentence
        self.read, self.more = 0, True

    async def __call__(self) -> Message:
        message = await asyncio.wait_for(self._receive(), SILENT_SECONDS)
        self.more = message.get("more_body", False)
        self.read += len(message.get("body", b""))
        if self.read > self.most:
            raise Refused(self.sentence, 413)
        return message

    async def drain(self) -> None:
        """Reads on a while, so that a sender who is still sending gets to read the answer."""
        self.most, most = math.inf, 4 * self.most
        while self.more and self.read < most:
            await self()


def add_score(app: FastAPI, desk: Desk, folder: Path) -> None:
    """Adds POST /score to the app.

    Args:
        folder: for what is being scored; nothing of it stays there.
    """

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        body = Bounded(request.receive, desk.most_bytes + FORM_BYTES, desk.too_large)
        try:
            with desk.arrival():  # before a byte of it is read
                return JSONResponse(await answer(Request(request.scope, body), desk, folder))
        except Refused as refused:
            try:
                if refused.status != 408:
                    await asyncio.wait_for(body.drain(), SECONDS + desk.megabytes)
            except (asyncio.TimeoutError, ClientDisconnect):
                pass
            headers = {"Retry-After": "5"} if refused.status == 503 else {}
            return JSONResponse({"detail": str(refused)}, refused.status, headers)


async def answer(request: Request, desk: Desk, folder: Path) -> dict:
    """
    Raises:
        Refused: it is no picture, or has no score.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refused(f"The request holds no form. {HOW}", 415)
    seconds = SECONDS + desk.megabytes
    try:
        form = await asyncio.wait_for(request.form(max_files=1, max_fields=4), seconds)
    except HTTPException as error:
        raise Refused(f"The form cannot be read: {error.detail.rstrip('.')}. {HOW}", 400) from error
    except (UnicodeError, LookupError) as error:
        raise Refused(f"The form cannot be read: its charset does not fit its text. {HOW}", 400) from error
    except asyncio.TimeoutError as error:
        raise Refused(
            f"The file did not arrive in time: within {seconds} seconds, and never {SILENT_SECONDS} without a byte.",
            408,
        ) from error
    except ClientDisconnect as error:
        raise Refused("The request broke off.", 400) from error
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise Refused(f"There is no such file in the form. {HOW}", 400)
        with desk.place():  # who is slow to send holds none
            return await run_in_threadpool(judge, file, desk, folder)
    finally:
        await form.close()


def judge(file: UploadFile, desk: Desk, folder: Path) -> dict:
    """The answer for one file; in a thread. A video has to be on the disk to be read, so pictures are, too."""
    name = PurePath(as_text(file.filename or "").replace("\\", "/")).name[-NAME_LENGTH:] or "picture"
    ending = PurePath(name).suffix.lower()
    ending = ending if ending in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS) else ""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        path = Path(own, f"picture{ending}")
        with open(path, "wb") as copy:
            shutil.copyfileobj(file.file, copy)
        judged = desk.judge(path, name)
    if judged.reason:
        raise Refused(judged.reason)
    return {"rows": [row.as_dict() for row in rows_of(judged)], "thresholds": desk.detector.thresholds}
