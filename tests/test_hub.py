"""Folders for the Hub: what is in them, that nothing is lost on the way there and back, and what is refused."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, run_script
from safetensors.torch import save_file
from test_weights import Evil, face, made, rows_of  # noqa: F401, fixtures

import export
import hubconf
import inference
from model import LAMMViTConfig
from runtime import hub, weights_file
from runtime.checkpoint import CheckpointError, load_checkpoint, read_checkpoint, save
from runtime.hub import LAMMViT, push_folder
from runtime.hub_folder import CONFIG, FILES, PREPROCESSOR, README, WEIGHTS, read_folder, write_folder
from runtime.weights_file import CARD, SETTINGS, portable


@pytest.fixture(scope="session")
def folders(made_once, made, trained) -> SimpleNamespace:  # noqa: F811
    """Of a whole model and of one beside its trunk: the checkpoint, the folder, what was said."""

    def write(root: Path) -> None:
        for name, checkpoint in (("whole", trained / "best_model.pth"), ("beside", made.checkpoint)):
            done = run_script("export.py", "--checkpoint", checkpoint, "--hub", root / name, cwd=root)
            (root / f"{name}.said").write_text(done.stdout)
        shutil.copy(made.weights.parent / "vit.pth", root / "beside")

    root = made_once("hub", write)
    said = {name: (root / f"{name}.said").read_text().replace(f"{root}/", "") for name in ("whole", "beside")}
    of = {"whole": trained / "best_model.pth", "beside": made.checkpoint}
    return SimpleNamespace(whole=root / "whole", beside=root / "beside", of=of, said=said)


@pytest.fixture
def copy(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders.whole, tmp_path / "copy"))


def assert_same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype and torch.equal(values, other[name]), name


# --------------------------------------------------------------------------------------------------- there and back


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "beside"])
def test_no_bit_is_lost(folders, tmp_path, name):
    folder = getattr(folders, name)
    (model, before), (other, after) = load_checkpoint(folders.of[name]), load_checkpoint(folder)
    assert_same_bits(before["model"], after["model"])
    assert_same_bits(model.state_dict(), other.state_dict())
    assert model.config == other.config and after["config"] == before["config"]
    assert torch.equal(before["images"], after["images"]) and len(after["images"])
    for key in ("mean_landmarks", "usual"):
        assert torch.equal(before["framing"][key], after["framing"][key])
    for key in set(SETTINGS) & before.keys() - {"arguments", "trunk", "config"}:
        assert json.dumps(after[key]) == json.dumps(before[key]), key
    assert after["arguments"] == json.loads(json.dumps(portable(before["arguments"])))
    if name == "beside":
        assert after["trunk"]["sha256"] == before["trunk"]["sha256"] and after["trunk"]["source"] == "vit.pth"
        assert (folder / WEIGHTS).stat().st_size < 0.9 * sum(values.nbytes for values in model.state_dict().values())
        shutil.copy(folder / "vit.pth", tmp_path)
    save(after, tmp_path / "again.pth")
    again, last = load_checkpoint(tmp_path / "again.pth")
    assert_same_bits(last["model"], before["model"])
    assert_same_bits(again.state_dict(), model.state_dict())


@pytest.mark.slow
def test_a_folder_is_taken_where_a_checkpoint_is(folders, face, features, tmp_path):  # noqa: F811
    rows = [
        rows_of(run_script("inference.py", "--images", face, "--checkpoint", checkpoint, cwd=tmp_path))
        for checkpoint in (folders.of["whole"], folders.whole)
    ]
    assert rows[0] == rows[1] and rows[0][0]["probability"]
    given = ("--features", features, "--bootstrap", 0, "--checkpoint", folders.whole)
    assert "Mean" in run_script("inference.py", *given, cwd=tmp_path).stdout
    run = json.loads((tmp_path / "prediction_results.json").read_text())["Run"]
    assert run["checkpoint"] == str(folders.whole) and len(run["checkpoint_sha256"]) == 64
    run_script("export.py", "--checkpoint", folders.beside, "--weights", "mine.safetensors", cwd=tmp_path)
    assert (tmp_path / "mine.safetensors").stat().st_size < (folders.beside / WEIGHTS).stat().st_size * 1.01
    run_script("export.py", "--checkpoint", folders.whole / WEIGHTS, "--hub", "again", cwd=tmp_path)
    assert (tmp_path / "again" / WEIGHTS).stat().st_size <= (folders.whole / WEIGHTS).stat().st_size * 1.01


# ------------------------------------------------------------------------------------------------------ what is in it


def test_the_files_say_what_the_model_is(folders):
    assert sorted(path.name for path in folders.whole.iterdir()) == sorted(FILES)
    model, checkpoint = load_checkpoint(folders.whole)
    config = json.loads((folders.whole / CONFIG).read_text())
    assert config["model_type"] == "lamm_vit" and config["config"]["patch_size"] == 56
    assert config["thresholds"] == checkpoint["thresholds"] and config["trunk"] is None
    settings = json.loads((folders.whole / PREPROCESSOR).read_text())
    assert settings["size"] == {"height": 224, "width": 224} and settings["image_mean"] == list(model.config.image_mean)
    assert settings["treatment"] == checkpoint["framing"]["treatment"]
    assert settings["region_masks"]["mask_style"] == checkpoint["mask_style"]
    assert np.array(settings["framing"]["mean_landmarks"]).shape == (68, 2)
    # The settings are those of the model: a picture by them alone, as transformers would have it
    pixels = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(settings[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    torch.testing.assert_close((pixels * settings["rescale_factor"] - mean) / std, model.normalize(pixels))
    assert folders.said["whole"].startswith(f"whole: {', '.join(FILES)}; ")
    assert folders.said["beside"].splitlines()[1:] == [
        "its trunk is not in it: whoever uses it needs vit.pth in that folder"
    ]
    card = (folders.beside / README).read_text()
    assert card.startswith("---\nlibrary_name: pytorch\n") and "`vit.pth`, SHA-256" in card and "1 %" in card
    assert "`real/Consistent`" in card and "no proof" in card
    for path in folders.beside.iterdir():
        if path.name != "vit.pth":
            assert str(ROOT).encode() not in path.read_bytes() and b"/tmp" not in path.read_bytes()


def test_a_card_that_is_there_stays_and_the_one_beside_the_weights_is_taken(made, tmp_path, capsys, monkeypatch):  # noqa: F811
    weights = tmp_path / "weights"
    shutil.copytree(made.weights.parent, weights)
    monkeypatch.setattr(weights_file, "SHIPPED", weights / "lamm_vit.safetensors")
    monkeypatch.chdir(tmp_path)
    (weights / CARD).write_text("# Of these weights\n")
    write: Callable = lambda: export.main(export.get_args_parser().parse_args(["--hub", "mine"]))  # noqa: E731
    write()
    assert (tmp_path / "mine" / README).read_text().endswith("---\n\n# Of these weights\n")
    (tmp_path / "mine" / README).write_text("my own\n")
    write()
    assert (tmp_path / "mine" / README).read_text() == "my own\n" and "that was there stays" in capsys.readouterr().out
    assert "is a file; name a folder" in refusal(export, "--hub", weights / CARD)
    assert "--hub its folder" in refusal(export, "--hub", "a", "--weights", "b.safetensors")
    assert "--hub its folder" in refusal(export, "--hub", "a", "--output_dir", "b")
    assert refusal(export, "--hub", "") == "--hub is empty; name a folder" and not (tmp_path / WEIGHTS).exists()


def test_one_place_says_which_card_stays_and_nothing_is_there_before_it_was_checked(folders, tmp_path):
    _, checkpoint = load_checkpoint(folders.of["whole"])
    assert write_folder(checkpoint, tmp_path / "mine", "# Given\n") is False
    assert (tmp_path / "mine" / README).read_text().endswith("# Given\n")
    (tmp_path / "mine" / README).write_text("my own\n")
    assert write_folder(checkpoint, tmp_path / "mine", "# Given\n") is True
    assert (tmp_path / "mine" / README).read_text() == "my own\n"
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == sorted(FILES)

    for _ in range(2):  # a program's card is no reason to keep what it says of other weights
        assert write_folder(checkpoint, tmp_path / "by a program") is False

    def differs(written: Path) -> None:
        assert read_folder(written)["config"] == checkpoint["config"]
        raise ValueError("differs")

    with pytest.raises(ValueError, match="differs"):
        write_folder(checkpoint, tmp_path / "other", check=differs)
    assert list((tmp_path / "other").iterdir()) == []


# ---------------------------------------------------------------------------------------------------- what is refused


def test_what_is_no_such_folder_is_one_line(folders, copy, tmp_path):
    executed, content = tmp_path / "executed", (folders.whole / WEIGHTS).read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    foreign = tmp_path / "foreign.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 24)}, foreign, {"format": "pt"})
    config = (folders.whole / CONFIG).read_text()
    spoiled = {
        (WEIGHTS, None): "there is no model.safetensors in it",
        (CONFIG, None): "there is no config.json in it",
        (WEIGHTS, content[: len(content) // 2]): "not a whole safetensors file",
        (WEIGHTS, bytes(flipped)): "damaged, its SHA-256 is another one",
        (WEIGHTS, pickle.dumps(Evil(executed))): "not a whole safetensors file",
        (WEIGHTS, foreign.read_bytes()): "a safetensors file, but not of export.py --hub",
        (WEIGHTS, folders.of["whole"].read_bytes()): "not a whole safetensors file",
        (WEIGHTS, (folders.beside / WEIGHTS).read_bytes()): "says something else than model.safetensors",
        (CONFIG, b"{"): "cannot be read as JSON",
        (CONFIG, b"\xff\xfe"): "cannot be read as JSON",
        (CONFIG, b"[" * 100_000): "cannot be read as JSON",
        (CONFIG, b"[]"): "says something else than model.safetensors",
        (CONFIG, pickle.dumps(Evil(executed))): "cannot be read as JSON",
        (CONFIG, config.replace('"patch_size": 56', '"patch_size": 28').encode()): "says something else",
    }
    for (name, replaced), reason in spoiled.items():
        before = (copy / name).read_bytes()
        (copy / name).unlink()
        if replaced is not None:
            (copy / name).write_bytes(replaced)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(copy)
        line = str(error.value)
        assert line.startswith(str(copy)) and reason in line and "\n" not in line, name
        assert line.endswith("write it again: python export.py --hub") and "--weights" not in line, line
        assert name in line
        with pytest.raises(CheckpointError):
            LAMMViT.from_pretrained(copy)
        (copy / name).write_bytes(before)
    assert reason in refusal(inference, "--images", "face.png", "--checkpoint", copy) or load_checkpoint(copy)
    (tmp_path / "empty").mkdir()
    assert "there is no config.json in it" in refusal(
        inference, "--images", "a.png", "--checkpoint", tmp_path / "empty"
    )
    assert not executed.exists()


def test_a_missing_trunk_is_named(folders, tmp_path):
    alone = Path(shutil.copytree(folders.beside, tmp_path / "alone"))
    (alone / "vit.pth").unlink()
    with pytest.raises(CheckpointError, match=r"trunk is missing: .*put its file there or beside the checkpoint"):
        LAMMViT.from_pretrained(alone)


def test_a_trunk_with_the_name_of_the_folders_own_file_gets_another(folders, tmp_path):
    """Hugging Face calls each model's file model.safetensors."""
    trunk, checkpoint = tmp_path / WEIGHTS, read_checkpoint(folders.of["beside"], "cpu")
    save_file(torch.load(folders.of["beside"].parent.parent / "vit.pth", weights_only=True), trunk)
    checkpoint["trunk"]["source"] = checkpoint["arguments"]["init_from"] = str(trunk)
    save(checkpoint, tmp_path / "mine.pth")
    said = run_script("export.py", "--checkpoint", "mine.pth", "--hub", "mine", cwd=tmp_path).stdout
    assert f"whoever uses it needs {WEIGHTS} in that folder, as trunk_{WEIGHTS}\n" in said
    target = tmp_path / f"trunk_{WEIGHTS}"
    assert "has the name of its trunk's file" in refusal(
        export, "--checkpoint", tmp_path / "mine.pth", "--weights", target
    )
    trunk.rename(tmp_path / f"mine/trunk_{WEIGHTS}")
    assert_same_bits(load_checkpoint(tmp_path / "mine")[1]["model"], checkpoint["model"])


# ------------------------------------------------------------------------------------------------- the three methods


def test_a_model_alone_is_saved_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model = LAMMViT(LAMMViTConfig(embed_dim=24, depth=2, patch_size=56, read_blocks=(1, 2)))
    model.save_pretrained(tmp_path / "mine")
    again = LAMMViT.from_pretrained(str(tmp_path / "mine"))
    assert again.config == model.config and not again.training
    assert_same_bits(model.state_dict(), again.state_dict())
    line = refusal(inference, "--images", "face.png", "--checkpoint", tmp_path / "mine")
    assert "holds a model alone, and not how it judges pictures" in line and "\n" not in line


def test_what_was_read_goes_where_the_model_is_saved(folders, tmp_path):
    """Beside a trunk, too, which is in the new folder then."""
    model = LAMMViT.from_pretrained(folders.beside)
    model.save_pretrained(tmp_path / "mine")
    other, after = load_checkpoint(tmp_path / "mine")
    before = load_checkpoint(folders.of["beside"])[1]
    assert_same_bits(model.state_dict(), other.state_dict())
    assert after["thresholds"] == before["thresholds"] and after["trunk"] is None
    hubconf.lamm_vit(checkpoint=str(folders.of["whole"])).save_pretrained(tmp_path / "by_torch_hub")
    again = load_checkpoint(tmp_path / "by_torch_hub")[1]
    assert again["thresholds"] and again["thresholds"] == load_checkpoint(folders.of["whole"])[1]["thresholds"]
    model, checkpoint = load_checkpoint(folders.of["whole"])
    model.save_pretrained(tmp_path / "given", checkpoint)
    assert_same_bits(load_checkpoint(tmp_path / "given")[1]["model"], checkpoint["model"])
    assert torch.equal(load_checkpoint(tmp_path / "given")[1]["images"], checkpoint["images"])


class Api:
    """In the place of the Hub."""

    made: list = []

    def __init__(self, token: str | None = None):
        self.token = token

    def create_repo(self, repo_id: str, **options: object) -> SimpleNamespace:
        self.made.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id: str, **options: object) -> None:
        self.made.append(("create_branch", repo_id, options))

    def upload_folder(self, folder_path: str, allow_patterns: list[str], **options: object) -> SimpleNamespace:
        there = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        sent = {name: content for name, content in there.items() if name in allow_patterns}
        self.made.append(("upload_folder", sent, options))
        return SimpleNamespace(commit_url="https://somewhere/commit")


def test_what_is_pushed(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "made", [])
    model = LAMMViT.from_pretrained(folders.whole)
    assert model.push_to_hub("mine", private=True, branch="new") == "https://somewhere/commit"
    (_, name, created), (_, branched, _), (_, sent, uploaded) = Api.made
    assert name == "mine" and created == {"private": True, "exist_ok": True} and branched == "me/mine"
    assert sorted(sent) == sorted(FILES) and uploaded["repo_id"] == "me/mine" and uploaded["revision"] == "new"
    (tmp_path / "sent").mkdir()
    for file, content in sent.items():
        (tmp_path / "sent" / file).write_bytes(content)
    assert_same_bits(load_checkpoint(tmp_path / "sent")[0].state_dict(), model.state_dict())

    Api.made.clear()
    folder = Path(shutil.copytree(folders.beside, tmp_path / "beside"))
    (folder / "secrets.txt").write_text("of mine")
    push_folder(folder, "small")
    assert sorted(Api.made[-1][1]) == sorted([*FILES, "vit.pth"]), "what the model needs, and nothing else"
    (folder / CONFIG).unlink()
    Api.made.clear()
    with pytest.raises(CheckpointError, match="no config.json"):
        push_folder(folder, "small")
    assert not Api.made


def test_what_is_fetched(folders, tmp_path, monkeypatch):
    asked = []

    def download(repo_id: str, allow_patterns: list[str], **options: object) -> str:
        asked.append((repo_id, options))
        (tmp_path / "cache").mkdir(exist_ok=True)
        for name in allow_patterns:
            if (folders.beside / name).exists():
                shutil.copy(folders.beside / name, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = LAMMViT.from_pretrained("someone/model", revision="v1")
    assert asked == [("someone/model", {"revision": "v1"})] * 2  # the second time with the trunk
    assert_same_bits(model.state_dict(), load_checkpoint(folders.beside)[0].state_dict())

    def away(repo_id: str, **options: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    with pytest.raises(
        CheckpointError, match=r"^a/b: no such folder, and not to be had from the Hub \(no route to host"
    ):
        LAMMViT.from_pretrained("a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        hub.fetch("a/b")
    assert LAMMViT.from_pretrained(folders.whole).checkpoint["thresholds"], "a folder needs nothing of the Hub"


@pytest.mark.slow
def test_nothing_but_the_hub_needs_its_package():
    program = "import sys, train, inference, export, runtime.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=300).returncode == 0
