"""The plan of the house: who may import whom, how long lines and files may be. Read from the source, nothing is run."""

import ast
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ("preprocess", "feature_extraction", "train", "inference", "export", "demo", "app", "hubconf")
BENCHMARKS = (
    "ablation",
    "data_speed",
    "faces_found",
    "images_speed",
    "model_speed",
    "real_faces",
    "starts",
    "unseen",
    "wild",
)

# From the ground up. A module may import what stands on a line above its own, nothing beside it and nothing above.
ORDER = """
runtime.processes  runtime.files  runtime.devices  runtime.arguments  evaluation.typeset  evaluation.metrics
attention.layout  attention.textbook  drawing.coordinates  drawing.face
attention.dropout  attention.kernels  drawing.render  faces.rejection  faces.regions
attention.blocked  attention.flex  faces.images  faces.finder
attention.trial
attention  faces.alignment  faces.workers  faces.prepared  faces.videos
model  faces.treatment  faces.originals  samples.feature_files  samples.transforms
runtime.start  runtime.trunk_files
runtime.pretrained
runtime.tuning
runtime.weights_file
runtime.card
runtime.hub_folder
runtime.checkpoint  faces.loose  faces.prepare  samples.sources  dataset
samples.splits  samples.extracted  samples.manifest  runtime.hub
samples.plan
samples.shards
evaluation.scoring  evaluation.operating
evaluation.tables  evaluation.intervals  evaluation.figures  evaluation.protocol
evaluation.summary  evaluation.traces  evaluation.masks  evaluation.mistakes  evaluation.explain  evaluation.groups
evaluation.robustness  evaluation.report  evaluation.pictures
evaluation.detector
serving.desk
serving.show
serving.score
serving.uploads
serving.page
training.options  training.data  training.run
training.schedule  training.record  training.cache
training.setup  training.step  training.readings
training.probe  training.compiled
training.state
benchmarks.comparison.near_duplicates  benchmarks.comparison.variants
benchmarks.comparison.images
benchmarks.comparison.probes  benchmarks.comparison.jobs  benchmarks.comparison.scores  benchmarks.comparison.folds
benchmarks.comparison.tables  benchmarks.comparison.frozen  benchmarks.comparison.judge
benchmarks.comparison.detectors
benchmarks.comparison.fold_tables
"""
FLOORS = {module: floor for floor, line in enumerate(ORDER.split("\n")) for module in line.split()}
ROOF = len(ORDER)  # where the scripts are


def python_files() -> list[Path]:
    """Those of the repository, but for the tests."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: which files are the repository's is not known")
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split() if not name.startswith("tests/") and (ROOT / name).exists()]


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, modules: set[str]) -> set[str]:
    """The modules of the repository that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module}
    return found & modules


def imports() -> dict[str, set[str]]:
    """{module: what it imports}; packages that are empty are none."""
    files = {module_of(path): (ROOT / path).read_text(encoding="utf-8") for path in python_files()}
    sources = {module: source for module, source in files.items() if source.strip()}
    return {module: imports_of(source, set(sources)) for module, source in sources.items()}


def floor_of(module: str) -> int:
    is_script = module in SCRIPTS or module.removeprefix("benchmarks.") in BENCHMARKS
    return ROOF if is_script else FLOORS[module]


def broken_rules(imported: dict[str, set[str]]) -> list[str]:
    """A sentence for each import that the order forbids."""
    broken = []
    for module, others in sorted(imported.items()):
        for other in sorted(others):
            if floor_of(other) == ROOF:
                broken.append(f"{module} imports the script {other}")
            elif floor_of(other) >= floor_of(module):
                broken.append(f"{module} imports {other}, which does not stand below it")
    return broken


def circle(imported: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        found = next(filter(None, (walk(other, [*path, module]) for other in sorted(imported.get(module, ())))), [])
        done.add(module)
        return found

    return next(filter(None, (walk(module, []) for module in sorted(imported))), [])


def rooms(imported: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same for folders and top-level modules; runtime has two floors, below the faces and above the model."""

    def room(module: str) -> str:
        lower = ("runtime.processes", "runtime.files", "runtime.devices")
        return "runtime, lower floor" if module in lower else module.split(".")[0]

    found: dict[str, set[str]] = {}
    for module, others in imported.items():
        found.setdefault(room(module), set()).update(room(other) for other in others if room(other) != room(module))
    return found


def test_arrows_run_down_only():
    assert broken_rules(imports()) == []


def test_there_is_no_circle_of_modules_nor_of_rooms():
    assert circle(imports()) == [] and circle(rooms(imports())) == []


def test_every_module_has_its_place_in_the_order():
    known = {*FLOORS, *SCRIPTS, *(f"benchmarks.{name}" for name in BENCHMARKS)}
    assert set(imports()) == known


@pytest.mark.parametrize(
    ("module", "line", "rule"),
    [
        ("faces.regions", "import preprocess", "faces.regions imports the script preprocess"),
        ("faces.regions", "def f():\n    from train import main", "faces.regions imports the script train"),
        ("benchmarks.ablation", "from inference import main", "benchmarks.ablation imports the script inference"),
        (
            "faces.images",
            "from faces.finder import ROOT",
            "faces.images imports faces.finder, which does not stand below",
        ),
        ("model", "from evaluation import scoring", "model imports evaluation.scoring, which does not stand below"),
        ("runtime.files", "import model", "runtime.files imports model, which does not stand below"),
    ],
)
def test_a_forbidden_import_would_be_seen(module, line, rule):
    imported = imports()
    imported[module] = imported[module] | imports_of(line, set(imported))
    assert any(sentence.startswith(rule) for sentence in broken_rules(imported))


def test_a_circle_would_be_seen():
    imported = imports()
    imported["faces.regions"] = imported["faces.regions"] | {"dataset"}
    assert {"dataset", "faces.regions"} <= set(circle(imported))
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"] and circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_what_finds_and_stores_faces_knows_of_no_model():
    """Nor of torch, which workers that look for faces need not load."""
    imported = imports()

    def below(module: str) -> set[str]:
        return {module}.union(*(below(other) for other in imported[module]))

    for start in ("preprocess", "feature_extraction", "dataset"):
        needed = below(start)
        assert not {"model", "runtime.checkpoint", "evaluation.scoring"} & needed
        for module in needed:
            path = ROOT / (module.replace(".", "/") + ".py")
            at_start = [
                node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
            ]
            assert not [node for node in at_start if ast.unparse(node).split()[1].startswith("torch")], module


def test_files_fit_a_reader():
    """Scripts of about 350 lines and modules of about 300, lines that end before column 120."""
    for path in python_files():
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 400, path
        assert max(map(len, lines), default=0) <= 120, path


def test_functions_need_not_be_scrolled():
    for path in python_files():
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"
