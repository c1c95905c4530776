"""The card of a model: what it is, what it was measured on, what it cannot do. Markdown, for people.

    checkpoint  ->  weights/MODEL_CARD.md, mine.md    beside the weights (export.py --weights)
                ->  README.md                         of a folder for the Hub (export.py --hub)

A card ends with a digest of its text. Where that does not fit, or is not there, somebody has written or changed it, and
it stays as it is.
"""

import hashlib
import re
from pathlib import Path

from faces.regions import REGIONS
from model import LAMMViTConfig
from runtime.files import replacing
from runtime.weights_file import CARD, SHIPPED, settings_of

README = "README.md"  # the card of a folder for the Hub
FRONT = """---
library_name: pytorch
pipeline_tag: image-classification
tags:
- lamm-vit
- ai-generated-image-detection
- face
---
"""
ABOVE_GUESSING = 0.6  # an AUC on unknown data sets from which on a head knows something of them
SEAL = "<!-- written by a program, SHA-256 of the text above: {} -->\n"
LIMITS = """It looks for faces that were generated whole. It was not made for swapped or retouched faces, nor for
documents, and knows best the generators that it was trained on. A verdict is no proof in either direction, and nothing
by which to judge people."""


def card_path(weights: Path) -> Path:
    """Where the card of these weights is: a checkpoint, or a folder for the Hub."""
    if weights.is_dir():
        return weights / README
    return weights.with_name(CARD) if weights.name == SHIPPED.name else weights.with_suffix(".md")


def read_card(weights: Path) -> str | None:
    """The text of card_path, None where there is none."""
    path = card_path(weights)
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def stays(weights: Path) -> bool:
    """Whether there is a card that no program has written, or one that was changed since."""
    card, path = read_card(weights), card_path(weights)
    return path.exists() if card is None else is_own(card)  # a folder of this name stays, too


def is_own(card: str) -> bool:
    card = card.removeprefix(with_front(""))
    text, _, _ = card.rpartition("<!--")
    return card != sealed(text)


def sealed(text: str) -> str:
    return text + SEAL.format(hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest())


def with_front(card: str) -> str:
    return card if card.startswith("---\n") else f"{FRONT}\n{card}"


def write_card(checkpoint: dict, weights: Path) -> bool:
    """Writes card_of to card_path, unless one stays there: returns whether it does."""
    if keep := stays(weights):
        return keep
    with replacing(card_path(weights), sync=True) as partial:
        partial.write_text(card_of(checkpoint), encoding="utf-8", errors="backslashreplace")
    return False


def limits_of(weights: Path) -> str:
    """What has to be said under a verdict, Markdown: of the card its sections on limits, where there are some."""
    section, level = [], 0  # of the section that we are in, by the signs of its heading
    for line in (read_card(weights) or "").splitlines():
        if heading := re.match("(#+) +(.*)", line):
            if not level or len(heading[1]) <= level:
                level = len(heading[1]) if re.search(r"\blimit(s|ations?)?\b", heading[2], re.I) else 0
            line = f"**{heading[2]}**"
        if level:
            section.append(line)
    text = "\n".join(section).strip()
    return text if "\n" in text else f"**What it cannot do.** {LIMITS}"


def card_of(checkpoint: dict) -> str:
    """What is known of a model."""
    command = """With the code, in its folder: `python inference.py --checkpoint PATH --images photo.jpg`, or

```python
import torch

detector = torch.hub.load("path/to/the/code", "detector", source="local", checkpoint="PATH")
```
"""
    model_alone = """With the code, in its folder:

```python
from runtime.hub import LAMMViT

model = LAMMViT.from_pretrained("FOLDER")
```
"""
    return sealed(f"""# LAMM-ViT

Tells photographs of faces from generated ones. An open implementation of LAMM-ViT (Zhang et al., ECAI 2025,
[arXiv 2505.07734](https://arxiv.org/abs/2505.07734)).

{facts_of(checkpoint)}
{unknown_table(checkpoint.get("unknown"))}
## Limits

{LIMITS}

## Terms

This card was written by a program. Nobody has said under which terms these weights may be used. The terms of the images
of training may hold for them, too.

## Use

{command if "framing" in checkpoint else model_alone}
""")


def as_code(name: str) -> str:
    """A name in Markdown, in a table, too."""
    fence = "``" if "`" in name else "`"
    return f"{fence}{name}{fence}".replace("|", "\\|")


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
        names = ", ".join(map(as_code, datasets))
        lines.append(f"- Trained and validated on {images}{len(datasets)} data sets: {names}.")
    if "framing" in checkpoint:
        lines.append(f"- Training images were: {checkpoint['framing']['treatment'] or 'resized alone'}.")
    known = (("val_auc", "AUC"), ("val_ap", "AP"))
    if measured := [f"{title} {checkpoint[name]:.4f}" for name, title in known if name in checkpoint]:
        lines.append(f"- On its validation images: {', '.join(measured)}. Images of other sources may be harder.")
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
        lines.append(f"| {as_code(name)} | {found['images']} | {found['auc']:.3f} | {' | '.join(shares)} |")
    mean = sum(found["auc"] for found in unknown.values()) / len(unknown)
    table = "\n".join(lines)
    worthless = "" if mean >= ABOVE_GUESSING else "**There it is hardly better than guessing, or worse.**\n\n"
    return f"""
## On sources that it does not know

{worthless}Each data set was left out of the training in turn, and its images were judged by a head that had seen
none of them. The AUC is against the left-out data sets of the other class; {mean:.3f} in the mean. Similar data sets
(of the same family of generators, say) stayed in. The thresholds were chosen on these photographs, too, so that other
photographs may be called fake more often. For pictures from other sources, this table is the best guess that there is.

{table}
"""
