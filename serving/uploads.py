"""What is handed in on the page, with the bounds that Gradio's own way of taking files does not have.

    bound_uploads(app, desk)  ->  POST /gradio_api/upload takes no more than the desk has room for

Gradio has no setting for these: two of its classes are replaced, and of its routes those that take files and that no
page of ours asks for are closed.
"""

import asyncio
import contextlib
import functools
import hashlib
import secrets
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from gradio import route_utils
from starlette.datastructures import FormData, Headers
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from serving.desk import MEGABYTE, MOST_FILES, Desk, Refused
from serving.score import SECONDS, SILENT_SECONDS

CHECKED_BYTES = MEGABYTE  # after so many more of a form it is asked again whether there is room


class OwnFolder(route_utils.GradioUploadFile):
    """An upload whose folder no other one has. Gradio names folders by what is in the file: of two people who hand in
    the same picture, one would lose it when that of the other is removed."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.sha = hashlib.sha256(secrets.token_bytes(32))


class BoundedForm(route_utils.GradioMultiPartParser):
    """A form of files and nothing else. Of one that is refused, or breaks off, nothing stays on the disk."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], *, desk: Desk, **options: Any):
        super().__init__(headers, self._bounded(), **options | {"max_files": MOST_FILES, "max_fields": 0})
        self.desk, self.body = desk, stream

    async def _bounded(self) -> AsyncGenerator[bytes, None]:
        """The body, as long as there is room and no long silence."""
        read = checked = 0
        try:
            while True:
                if read >= checked:
                    self.desk.check_room(Path(self.upload_dir))
                    checked = read + CHECKED_BYTES
                chunk = await asyncio.wait_for(anext(self.body, None), SILENT_SECONDS)
                if chunk is None:
                    return
                read += len(chunk)
                yield chunk
        except Refused as refused:
            raise MultiPartException(str(refused)) from refused
        except asyncio.TimeoutError as error:
            raise MultiPartException(f"The files did not arrive: {SILENT_SECONDS} seconds without a byte.") from error

    async def _drain(self) -> None:
        """Reads on a while, so that a sender who is still sending gets to read the answer."""
        read = 0
        async for chunk in self.body:
            read += len(chunk)
            if read > 4 * self.desk.most_bytes:
                return

    async def parse(self) -> FormData:
        try:
            return await super().parse()
        except BaseException as error:
            for file in self._files_to_close_on_error:
                file.close()
                Path(file.name).unlink(missing_ok=True)
            if isinstance(error, MultiPartException):
                with contextlib.suppress(asyncio.TimeoutError, ClientDisconnect):
                    await asyncio.wait_for(self._drain(), SECONDS + self.desk.megabytes)
            raise


async def nothing_there(request: Request) -> Response:
    return Response(status_code=404)


def bound_uploads(app: FastAPI, desk: Desk) -> None:
    """Has to be called before Gradio's page is mounted on the app."""
    route_utils.GradioUploadFile = OwnFolder
    route_utils.GradioMultiPartParser = functools.partial(BoundedForm, desk=desk)
    for taking in ("component_server", "component_server/", "process_recording"):
        app.add_route(f"/gradio_api/{taking}", nothing_there, methods=["POST"])
    # Gradio would fetch these for whoever asks
    for fetched in ("file=http:{rest:path}", "file=https:{rest:path}", "proxy={rest:path}"):
        app.add_route(f"/gradio_api/{fetched}", nothing_there, methods=["GET", "HEAD"])
