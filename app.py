"""A page in the browser: pictures in, for each face a verdict, a probability and why; and POST /score for programs.

    a model + a browser  ->  http://127.0.0.1:7860, a page
    a model + curl       ->  JSON, the columns of inference.py --images

    python app.py                                           the model that train.py left, else the weights that ship
    python app.py --checkpoint mine.safetensors --port 8000
    curl -F file=@photo.jpg http://127.0.0.1:7860/score     a picture or a video; a row for each face

It listens for this machine alone. Nothing is sent anywhere, and nothing of a picture stays on the disk: a file is
removed when it was scored, and the faces of an answer are kept in memory for ten minutes, so that a click can ask why.
One picture is scored at a time, some more wait, and who comes then is told so (docs/app.md).

Needs Gradio: `make app` installs it (requirements-app.txt).
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from drawing.face import GENERATORS
from drawing.render import draw_file
from evaluation.detector import Detector
from runtime.card import limits_of
from serving.desk import Desk, sweep

if TYPE_CHECKING:
    from fastapi import FastAPI

EXAMPLES = (("Consistent", None), *((name, name) for name in GENERATORS))
EXAMPLE_SIDE = 448  # pixels
SWEEP_SECONDS = 60


def draw_examples(folder: Path) -> list[tuple[str, Path]]:
    """A consistent face and one of each of the demo's generators: what each is, and its file."""
    folder.mkdir()
    drawn = []
    for i, (title, generator) in enumerate(EXAMPLES):
        path = folder / f"{title}.png"
        draw_file((path, generator, [7, i, 0]), size=EXAMPLE_SIDE)
        drawn.append((title, path))
    return drawn


def make_app(args: argparse.Namespace, folder: Path) -> tuple["FastAPI", Desk]:
    """The page and POST /score. All that is written goes to the folder: uploads/ for a moment, examples/."""
    uploads = folder / "uploads"
    uploads.mkdir()
    os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
    from fastapi import FastAPI  # what follows reads the environment when it is imported

    from serving.page import build_page, mount_page
    from serving.score import add_score

    detector = Detector(
        args.checkpoint, args.device, args.fpr, args.frames, without_cnn=args.without_cnn, predictor=args.predictor
    )
    desk = Desk(detector, args.megabytes, args.waiting)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_score(app, desk, uploads)
    page = build_page(desk, uploads, draw_examples(folder / "examples"), limits_of(detector.path))
    return mount_page(app, page, desk), desk


def keep_clean(uploads: Path, desk: Desk) -> None:
    """Throws away what nobody asks for any more, for ever."""
    while True:
        time.sleep(SWEEP_SECONDS)
        sweep(uploads)
        desk.forget_old()


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--checkpoint", type=Path, help="of train.py or export.py --weights (default: as for inference.py)")
    option("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every one, for all in the network")
    option("--port", type=int, default=7860, help="(default: %(default)s)")
    option("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")
    option("--fpr", type=float, metavar="RATE", help="judge at this rate of false alarms alone; nothing is uncertain")
    option("--frames", type=int, default=16, help="of each video, evenly spread (default: %(default)s)")
    option("--megabytes", type=int, default=50, help="of a file, at most (default: %(default)s)")
    option("--waiting", type=int, default=8, help="pictures that are taken at a time (default: %(default)s)")
    option("--without_cnn", action="store_true", help="do not look with dlib's CNN for faces that are hard to find")
    option("--predictor", type=Path, help="dlib's 68-point predictor, as for feature_extraction.py")
    return parser


def main(args: argparse.Namespace) -> None:
    if min(args.megabytes, args.waiting) < 1:
        raise ValueError("--megabytes and --waiting have to be at least 1")
    import uvicorn

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the desk has bounds of its own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and not at once: the folder is removed first
    with tempfile.TemporaryDirectory(prefix="lamm_vit_app_") as folder:
        app, desk = make_app(args, Path(folder))
        threading.Thread(target=keep_clean, args=(Path(folder, "uploads"), desk), daemon=True).start()
        print(f"http://{args.host}:{args.port} judges with {desk.detector.path}; Ctrl-C ends it", flush=True)
        uvicorn.run(app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed: run `make app`, or pip install -r requirements-app.txt")
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
