"""For torch.hub: the model, and a detector that judges pictures.

    torch.hub.load("owner/name", "lamm_vit")                                    from GitHub
    torch.hub.load("folder of this repository", "detector", source="local")("photo.jpg").faces

A program that loads them may have a module `model` or `dataset` of its own. So ours come under another name: a package
of this folder's, in which `from model import LAMMViT` means the model beside it, now and whenever it is said later.
"""

# Modules alone: torch.hub offers every function and class that has a name here without an underscore
import ast
import hashlib
import importlib.machinery
import pathlib
import sys
import types

# Modules, not names of packages: torch.hub looks for them before it calls anything here
dependencies = [
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "cv2",
    "PIL",
    "dlib",
    "h5py",
    "safetensors",
    "psutil",
    "tqdm",
]

_ROOT = pathlib.Path(__file__).resolve().parent
_PACKAGE = f"lamm_vit_{hashlib.sha256(str(_ROOT).encode()).hexdigest()[:8]}"  # another copy of the code has another one
_OURS = {path.stem for path in _ROOT.glob("*.py")} | {path.parent.name for path in _ROOT.glob("*/__init__.py")}


def lamm_vit(pretrained: bool = True, checkpoint: str | None = None, device: str = "cpu", **config):
    """The model, in eval mode: model(model.normalize(images), region_masks)["logits"].

    Args:
        pretrained: with the weights of `checkpoint`; without: freshly drawn, as LAMMViTConfig(**config) says.
        checkpoint: of train.py or export.py --weights, or a folder of export.py --hub (default: the weights that ship,
            else output_model/best_model.pth).
        config: fields of LAMMViTConfig, where nothing is loaded.

    Raises:
        ValueError: there is no such checkpoint, or it cannot be used; options that do not go together.
    """
    _ours("runtime.hub")  # so that the model has save_pretrained, too
    if not pretrained:
        if checkpoint is not None:
            raise ValueError(f"checkpoint {checkpoint} is not for pretrained=False")
        model = _ours("model")
        return model.LAMMViT(model.LAMMViTConfig(**config)).eval().to(device)
    if config:
        raise ValueError(f"{', '.join(config)}: only for pretrained=False; a checkpoint says what model it is")
    weights = _ours("runtime.weights_file")
    named = weights.SHIPPED if weights.SHIPPED.exists() else None
    if checkpoint is not None:
        named = pathlib.Path(checkpoint)
    with _ours("runtime.arguments").naming_arguments():
        named = weights.choose_checkpoint(named)
    return _ours("runtime.hub").from_file(named, device)


def detector(checkpoint: str | None = None, **options):
    """evaluation.detector.Detector: judges pictures as `inference.py --images` does.

    Args:
        checkpoint: as for lamm_vit (default: output_model/best_model.pth, else the weights that ship).
        options: device, fpr, frames, whole_image, without_cnn, predictor.
    """
    return _ours("evaluation.detector").Detector(checkpoint, **options)


# ------------------------------------------------------------------------------------------- modules under another name


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads our source as if it named its neighbours with the package before them. No bytecode is read or written: that
    beside the source is of the source as it stands."""

    def get_code(self, fullname: str) -> types.CodeType:
        tree = ast.parse(self.get_data(self.path), self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in _OURS:
                node.module = f"{_PACKAGE}.{node.module}"
        return compile(tree, self.path, "exec", dont_inherit=True)


class _Finder:
    """On sys.meta_path: what is below the package."""

    @staticmethod
    def find_spec(
        name: str, path=None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{_PACKAGE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


def _ours(name: str) -> types.ModuleType:
    """A module of this folder; where the program has ours under their own names, as in this folder, one of these."""
    there = [getattr(sys.modules.get(known), "__file__", None) for known in ("model", "attention")]
    if all(file and pathlib.Path(file).resolve().is_relative_to(_ROOT) for file in there):
        return importlib.import_module(name)
    if _PACKAGE not in sys.modules:
        package = types.ModuleType(_PACKAGE, "LAMM-ViT, from torch.hub.")
        package.__path__ = [str(_ROOT)]
        sys.modules[_PACKAGE] = package
        sys.meta_path.insert(0, _Finder)
    return importlib.import_module(f"{_PACKAGE}.{name}")
