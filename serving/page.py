"""The page in the browser, of Gradio's blocks: files or the camera in, an answer, and why.

    build_page(desk, examples)  ->  gr.Blocks; mount_page puts it on the FastAPI app that also has POST /score

An answer is HTML of serving/show.py, so nothing of it is in Gradio's folder of files; what was uploaded is removed from
there as soon as it was scored.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evaluation.detector import Judged
from evaluation.operating import describe_rates, describe_thresholds, why_apart
from serving.desk import MOST_FILES, Desk, Kept, Refused, as_text
from serving.show import (
    show_answer,
    show_examples,
    show_explanation,
    show_picture,
    show_refusal,
    small_picture,
)
from serving.uploads import bound_uploads

TITLE = "Photograph, or generated?"
INTRODUCTION = """# Photograph, or generated?
Hand in pictures with faces, or a video. Each face gets a verdict, with the probability that it was generated. Pictures
stay on this machine: they are removed after the answer, and the faces in it after ten minutes."""
# What was clicked on, or inside of
CLICKS = """element.addEventListener('click', event => {
    const found = event.target.closest('[data-ask]');
    if (found) trigger('click', {ask: found.dataset.ask});
});"""
SCROLL = "() => { document.getElementById('%s').scrollIntoView({behavior: 'smooth', block: 'start'}); }"
NO_ANSWER = "There is no answer: too many are waiting, or the connection broke off. Try again in a few seconds."
CSS = Path(__file__).with_name("page.css")
# A card may be a stranger's: from elsewhere it shows nothing, and to elsewhere its forms send nothing. Gradio's own
# scripts need the first line
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "form-action 'self'; base-uri 'self'; object-src 'none'; frame-src 'none'"
)
# What is left of a label over a small face; css= would lose it
NARROW = """<style>
@container (max-width: 90px) { .gradio-container .answer .box i { display: none; } }
@container (max-width: 30px) { .gradio-container .answer .box b { display: none; } }
</style>"""


def build_page(desk: Desk, folder: Path, examples: Sequence[tuple[str, Path]], limits: str) -> gr.Blocks:
    """
    Args:
        folder: Gradio's for uploads.
        examples: what each is, and its file.
        limits: Markdown, shown under every answer.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                with gr.Tab("Files"):
                    files = gr.File(
                        label=f"Up to {MOST_FILES} pictures or videos, {desk.megabytes} MB each",
                        file_count="multiple",
                        file_types=["image", "video"],
                        elem_id="files",
                        height=180,
                    )
                with gr.Tab("Camera"):
                    camera = gr.Image(
                        label="Camera",
                        sources=["webcam"],
                        type="filepath",
                        elem_id="camera",
                        height=300,
                        webcam_options=gr.WebcamOptions(mirror=False),
                    )
            with gr.Column():
                drawn = gr.HTML(show_examples(examples), js_on_load=CLICKS, elem_id="examples")
        answer = gr.HTML(js_on_load=CLICKS, elem_id="answer", min_height=20)
        gr.Markdown(limits, elem_id="limits")
        why = gr.HTML(elem_id="why", js_on_load=None)

        def score_files(uploads: Any, progress: gr.Progress = gr.Progress()) -> tuple[str, str, None]:  # noqa: B008
            return answer_uploads(desk, folder, uploads, progress), "", None

        def score_example(event: gr.EventData) -> tuple[str, str]:
            with said():
                number = int(event.ask)
                if number < 0:
                    raise IndexError(number)  # examples[-1] is one, too
                title, path = examples[number]
                return answer_files(desk, [(path, f"{title}{path.suffix}")]), ""

        def explain(event: gr.EventData) -> str:
            with said():
                token, _, number = str(event.ask).partition(":")
                kept = desk.take(token, int(number))
                return desk.run(show_explanation, kept, desk.run(desk.detector.explain, kept.row))

        # One after another, in one queue; preprocess=False: the file itself, not a copy
        turn: dict[str, Any] = {
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "api_visibility": "private",
            "show_progress_on": answer,
        }
        for event, source in ((files.upload, files), (camera.input, camera)):
            local_only(source, folder)
            shown = [answer, why, source]
            follow(event(score_files, source, shown, preprocess=False, **turn), shown)
        follow(drawn.click(score_example, None, [answer, why], **turn), [answer, why])
        answer.click(explain, None, why, **turn | {"show_progress_on": why}).then(None, js=SCROLL % "why")
    page.has_launched = True  # Gradio's own check of paths does nothing before; a mounted page is never launched
    return page.queue(max_size=desk.places)


def follow(asked: Any, shown: list[gr.components.Component]) -> None:
    """What follows in the browser: the answer comes into sight, or a sentence in its place. Nothing of this goes to the
    queue, which may be full.

    Args:
        shown: the answer, why, and the files where they are cleared.
    """
    values = f"[{json.dumps(show_refusal(NO_ANSWER))}, '', null].slice(0, {len(shown)})"
    asked.failure(None, None, shown, js=f"() => {values}")
    asked.then(None, js=SCROLL % "answer")


def is_upload(path: Any, folder: Path) -> bool:
    """Whether it is a regular file below the folder, and no link to somewhere else. No byte of it is read."""
    try:
        real = Path(os.path.realpath(str(path)))
        return real.is_relative_to(folder.resolve()) and real.is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def local_only(component: gr.components.Component, folder: Path) -> None:
    """Gradio would fetch an upload whose path is an address, and copy one that is any file of this machine: to where
    the sender can read it, and after reading it to its end, which /dev/zero has not. What is not below the folder is
    refused before that."""
    move = component.async_move_resource_to_block_cache

    async def moved(path: Any) -> Any:
        if "://" in str(path):
            raise gr.Error("Only files are taken, no addresses.", print_exception=False)
        if path is not None and not is_upload(path, folder):
            raise gr.Error("Only files that were handed in here are taken.", print_exception=False)
        return await move(path)

    component.async_move_resource_to_block_cache = moved


@contextlib.contextmanager
def said():
    """Shows a refusal as a sentence in the corner of the page."""
    try:
        yield
    except Refused as refused:
        raise gr.Error(str(refused), title="Not possible", print_exception=False) from refused
    except (ValueError, IndexError, AttributeError, TypeError, OverflowError) as error:  # not of this page
        raise gr.Error("This is nothing that can be asked here.", print_exception=False) from error


def answer_uploads(desk: Desk, folder: Path, uploads: Any, progress: Callable | None = None) -> str:
    """The answer for what Gradio says of uploads: one dict, or a list of them. The files are removed."""
    given = [uploads] if isinstance(uploads, dict) else list(uploads or [])
    files = []
    for upload in given:
        if isinstance(upload, dict) and is_upload(upload.get("path"), folder):  # and no other file of this machine
            path = Path(os.path.realpath(str(upload.get("path"))))
            files.append((path, str(upload.get("orig_name") or path.name)))
    try:
        if not files:
            return show_refusal("No file has arrived. Hand it in again.")
        return answer_files(desk, files, progress)
    finally:
        for path, _ in files:
            shutil.rmtree(path.parent) if path.parent != folder.resolve() else path.unlink(missing_ok=True)


def answer_files(desk: Desk, files: Sequence[tuple[Path, str]], progress: Callable | None = None) -> str:
    """The answer for files, each with the name that its owner gave it."""
    answers, pictures = [], []
    for i, (path, name) in enumerate(files):
        if progress and len(files) > 1:
            progress((i, len(files)), unit="files")
        name = Path(as_text(name)).name
        try:
            if i >= MOST_FILES:
                raise Refused(f"Was left out: more than {MOST_FILES} files at a time are too many.")
            answers.append(desk.judge(path, name))
            pictures.append(desk.run(small_picture, path))
        except Refused as refused:
            answers.append(Judged(Path(name), [], str(refused), []))
            pictures.append(None)
    faces = [
        Kept(row, picture[1] if picture else None) for judged, picture in zip(answers, pictures) for row in judged.faces
    ]
    token, first, sections = desk.keep(faces), 0, []
    for judged, picture in zip(answers, pictures):
        sections.append(show_picture(judged, picture, token, first, desk.detector.thresholds))
        first += len(judged.faces)
    return show_answer(answers, sections, legend_of(desk))


def legend_of(desk: Desk) -> str:
    thresholds = desk.detector.thresholds
    between = ", uncertain between" if len(set(thresholds.values())) > 1 else ""
    calibrated = "calibrated" if desk.detector.checkpoint.get("temperature") else "not calibrated"
    return (
        f"P(fake) is the model's probability that the face was generated, {calibrated}. Verdicts:"
        f" {describe_thresholds(thresholds)}{between}: {describe_rates(thresholds)}. {why_apart(thresholds)}"
    )


class KeepToThisHost:
    """Tells the browser to load nothing from other hosts for the page, and to send them no form."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy)


def mount_page(app: FastAPI, page: gr.Blocks, desk: Desk) -> FastAPI:
    """The page at / of the app, without fonts, scripts or pictures of other hosts."""
    bound_uploads(app, desk)
    app.add_middleware(KeepToThisHost)
    system = ("system-ui", "sans-serif")
    theme = gr.themes.Default(primary_hue="blue", font=system, font_mono=("ui-monospace", "monospace"))
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        app_kwargs={"openapi_url": None},
        theme=theme,
        css=CSS.read_text(encoding="utf-8"),
        head=NARROW,
        footer_links=[],
        run_history=False,
        max_file_size=desk.most_bytes,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
    )
