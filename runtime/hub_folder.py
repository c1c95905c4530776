"""A model as a folder, as the Hugging Face Hub has them: weights, settings, how pictures are prepared, a card.

    checkpoint  ->  model.safetensors, config.json, preprocessor_config.json, README.md  ->  the same checkpoint

model.safetensors is a file of weights_file.py with each number as it is in the checkpoint. It has the settings, too;
config.json says the same for people and other programs, and has to agree. A frozen trunk is not in it, but its name
and SHA-256 are. preprocessor_config.json follows from the rest: nothing reads it here.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from faces.regions import REGIONS
from model import LAMMViTConfig
from runtime.card import README, card_of, is_own, stays, with_front
from runtime.files import replacing
from runtime.weights_file import read_weights, settings_of, write_weights

WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
FILES = (WEIGHTS, CONFIG, PREPROCESSOR, README)
LABELS = {"architectures": ["LAMMViT"], "model_type": "lamm_vit"}  # in config.json, for the Hub
WRITER = "export.py --hub"
AGAIN = f"take another copy, or write it again: python {WRITER}"
LANCZOS = 1  # as Pillow numbers its filters


# ----------------------------------------------------------------------------------------------------------- the folder


def write_folder(
    checkpoint: dict, folder: Path, card: str | None = None, check: Callable[[Path], None] = lambda _: None
) -> bool:
    """A checkpoint of load_checkpoint, or a model alone: "version", "config", "model". Each file whole or not at all.

    Args:
        card: the text of README.md, if somebody has written it; in place of one that a program has written, what is
            known. A README.md that is there stays, if a program has not written it.
        check: is given the folder as it will be, in another place, before a file of it gets its name; raises where it
            is not right.

    Returns:
        whether somebody's card stays.

    Raises:
        OSError: a file cannot be written.
    """
    texts = {
        CONFIG: json.dumps(LABELS | settings_of(checkpoint), indent=2) + "\n",
        PREPROCESSOR: json.dumps(preprocessing(checkpoint), indent=2) + "\n",
        README: with_front(card if card and is_own(card) else card_of(checkpoint)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    keep = stays(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export.") as place:
        made = Path(place)
        write_weights(checkpoint, made / WEIGHTS, exact=True)
        for name, text in texts.items():
            with replacing(made / name, sync=True) as partial:
                partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        check(made)
        for name in FILES:
            if name != README or not keep:
                os.replace(made / name, folder / name)
    return keep


def read_folder(folder: Path) -> dict:
    """The checkpoint that write_folder was given, on the CPU, each number as it was. It lacks what read_weights lacks.

    Raises:
        ValueError: not such a folder, or a file of it damaged. The message names it and the way out.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no folder of {WRITER}, there is no {name} in it; {AGAIN}")
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / CONFIG}: cannot be read as JSON ({cause}); {AGAIN}") from error
    checkpoint = read_weights(folder / WEIGHTS, exact=True, writer=WRITER)
    # Through JSON, which knows no tuples
    known = json.loads(json.dumps(settings_of(checkpoint)))
    if not isinstance(told, dict) or {name: told[name] for name in told.keys() - LABELS.keys()} != known:
        raise ValueError(f"{folder / CONFIG}: says something else than {WEIGHTS} beside it; {AGAIN}")
    return checkpoint


def weights_in(path: Path) -> Path:
    """The file with the weights of a checkpoint: itself, or the one in a folder of write_folder."""
    return path / WEIGHTS if path.is_dir() else path


# ------------------------------------------------------------------------------------------------------------ its texts


def preprocessing(checkpoint: dict) -> dict:
    """How pictures become the model's input: as transformers says it, and what it has no words for."""
    config = LAMMViTConfig(**checkpoint["config"])
    settings = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": config.img_size, "width": config.img_size},
        "resample": LANCZOS,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "region_masks": {"regions": list(REGIONS), "height": config.grid_size, "width": config.grid_size},
    }
    if "mask_style" in checkpoint:
        settings["region_masks"]["mask_style"] = checkpoint["mask_style"]
    if framing := checkpoint.get("framing"):
        settings["treatment"] = framing["treatment"]  # of preprocess.py; "": resized alone
        # Landmarks (68, 2), x and y in units of the side: their mean over the faces of training, and the 1st and 99th
        # percentile of face_frame, that is of size and of width over height
        settings["framing"] = {name: framing[name].tolist() for name in ("mean_landmarks", "usual")}
    return settings
