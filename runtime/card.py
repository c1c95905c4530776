"""The card of a model: what it is, what it was measured on, what it cannot do. Markdown, for people.

checkpoint  ->  weights/MODEL_CARD.md        beside the weights (export.py --weights)
            ->  README.md                    of a folder for the Hub (export.py --hub)
"""

from pathlib import Path

from faces.regions import REGIONS
from model import LAMMViTConfig
from runtime.files import replacing
from runtime.weights_file import CARD, settings_of

README = "README.md"  # the card of a folder for the Hub
BY_A_PROGRAM = "This card was written by a program"  # one without these words is somebody's own
LIMITS = """It looks for faces that were generated whole. It was not made for swapped or retouched faces, nor for
documents, and knows best the generators that it was trained on. A verdict is no proof in either direction, and nothing
by which to judge people."""


def card_path(weights: Path) -> Path:
    """Where the card of these weights is: a checkpoint, or a folder for the Hub."""
    return weights / README if weights.is_dir() else weights.with_name(CARD)


def read_card(weights: Path) -> str | None:
    """The text of card_path, None where there is none."""
    path = card_path(weights)
    return path.read_text(encoding="utf-8") if path.is_file() else None


def limits_of(weights: Path) -> str:
    """What has to be said under a verdict, Markdown: of the card its sections on limits, where there are some."""
    section, inside = [], False
    for line in (read_card(weights) or "").splitlines():
        if line.startswith("#"):
            inside = "limit" in line.lower()
            line = f"**{line.lstrip('# ')}**"
        if inside:
            section.append(line)
    return "\n".join(section).strip() or f"**What it cannot do.** {LIMITS}"


def write_card(checkpoint: dict, weights: Path) -> bool:
    """Writes card_of to card_path, unless somebody has written another one there: returns whether it stays."""
    stays = is_own(read_card(weights))
    if not stays:
        with replacing(card_path(weights), sync=True) as partial:
            partial.write_text(card_of(checkpoint), encoding="utf-8", errors="backslashreplace")
    return stays


def is_own(card: str | None) -> bool:
    """Whether somebody has written this card, and no program."""
    return card is not None and BY_A_PROGRAM not in card


def card_of(checkpoint: dict) -> str:
    """What is known of a model."""
    return f"""# LAMM-ViT

Tells photographs of faces from generated ones. An open implementation of LAMM-ViT (Zhang et al., ECAI 2025,
[arXiv 2505.07734](https://arxiv.org/abs/2505.07734)).

{facts_of(checkpoint)}
{unknown_table(checkpoint.get("unknown"))}
## Limits

{LIMITS}

{BY_A_PROGRAM}; nobody has said under which terms these weights may be used. The terms of the images of training may
hold for them, too.

## Use

With the code, in its folder: `python inference.py --checkpoint PATH --images photo.jpg`, or

```python
import torch

detector = torch.hub.load("path/to/the/code", "detector", source="local", checkpoint="PATH")
```
"""


def facts_of(checkpoint: dict) -> str:
    """A list."""
    config = LAMMViTConfig(**checkpoint["config"])
    lines = [
        f"- Input: a face of {config.img_size} x {config.img_size} pixels and masks of its {len(REGIONS)} regions;"
        f" depth {config.depth}, width {config.embed_dim}."
    ]
    if trunk := checkpoint.get("trunk"):
        source = settings_of(checkpoint)["trunk"]["source"]
        lines.append(f"- Its trunk is not in these files: `{source}`, SHA-256 `{trunk['sha256']}`.")
    if datasets := checkpoint.get("datasets"):
        images = f"{len(checkpoint['images'])} images of " if "images" in checkpoint else ""
        names = ", ".join(f"`{name}`" for name in datasets)
        lines.append(f"- Trained and validated on {images}{len(datasets)} data sets: {names}.")
    if "framing" in checkpoint:
        lines.append(f"- Training images were: {checkpoint['framing']['treatment'] or 'resized alone'}.")
    known = (("val_auc", "AUC"), ("val_ap", "AP"))
    if measured := [f"{title} {checkpoint[name]:.4f}" for name, title in known if name in checkpoint]:
        lines.append(f"- On its validation images: {', '.join(measured)}. Images of other sources are harder.")
    if thresholds := checkpoint.get("thresholds"):
        known = ", ".join(f"{value:.4f} for {100 * float(rate):g} %" for rate, value in thresholds.items())
        lines.append(f"- Thresholds, by the rate of false alarms that they were chosen for in training: {known}.")
    return "\n".join(lines)


def unknown_table(unknown: dict[str, dict] | None) -> str:
    """A section with what evaluation.operating.judge_left_out found; "" where nothing was left out."""
    if not unknown:
        return ""
    rates = [name for name in next(iter(unknown.values())) if name not in ("images", "auc")]
    titles = ["data set", "images", "AUC", *(f"called fake at {100 * float(rate):g} %" for rate in rates)]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'--:|' * (len(titles) - 1)}"]
    for name, found in unknown.items():
        shares = (f"{100 * found[rate]:.1f} %" for rate in rates)
        lines.append(f"| `{name}` | {found['images']} | {found['auc']:.3f} | {' | '.join(shares)} |")
    mean = sum(found["auc"] for found in unknown.values()) / len(unknown)
    table = "\n".join(lines)
    return f"""
## On sources that it does not know

Each data set was left out of the training in turn, and its images were judged by a head that had seen none of them.
The AUC is against the left-out data sets of the other class; {mean:.3f} in the mean. The thresholds were chosen on
these photographs. This is the nearest to what a picture from elsewhere may expect, and relatives of a data set were
not left out with it.

{table}
"""
