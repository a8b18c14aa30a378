"""The layout of the project: what is packaged, who may import whom, what the text promises."""

from __future__ import annotations

import ast
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("export", "calibration", "runtime")

# What each room may import besides the standard library, the light base dependencies and `flashvlm_export` itself.
BASE = {"jinja2", "msgspec", "numpy", "PIL", "safetensors", "tokenizers", "tqdm"}
ALLOWED = {
    "": {"cuda", "onnxruntime"},
    "models": {"torch", "transformers", "optimum"},
    "selection": {"torch"},
    "cli": set(),
    # PyTorch is one of the backends that it compares, in a process of its own.
    "report": {"onnxruntime", "torch"},
    "evaluation": {"matplotlib"},
    "export": {
        "torch",
        "transformers",
        "optimum",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "onnxruntime_genai",
        "huggingface_hub",
    },
    "calibration": {"onnx", "onnxruntime"},
    # torch in two modules of it, see below.
    "runtime": {
        "anyio",
        "av",
        "cuda",
        "fastapi",
        "gguf",
        "h11",
        "llama_cpp",
        "onnxruntime",
        "prometheus_client",
        "pydantic",
        "ray",
        "starlette",
        "torch",
        "transformers",
        "uvicorn",
        "vllm",
    },
}


def sources() -> list[tuple[str, Path]]:
    """Every module with its room: ``""`` for the front room itself."""
    found = []
    for path in sorted((ROOT / "flashvlm_export").rglob("*.py")):
        parts = path.relative_to(ROOT / "flashvlm_export").parts
        if parts[0] not in ROOMS:
            found.append((parts[0] if len(parts) > 1 else "", path))
    for room in ROOMS:
        found += [(room, path) for path in sorted((ROOT / room).rglob("*.py")) if "optimum_register" not in path.parts]
    return found


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports anywhere, lazily or not; what only type checkers read is left out."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


@pytest.mark.parametrize(
    ("room", "path"), [pytest.param(*pair, id=str(pair[1].relative_to(ROOT))) for pair in sources()]
)
def test_a_room_imports_only_what_it_may(room: str, path: Path) -> None:
    tops = {name.partition(".")[0] for name in imported(path)}
    foreign = tops - set(sys.stdlib_module_names) - BASE - ALLOWED[room] - {"flashvlm_export"}
    assert not foreign


def test_only_engines_that_run_on_torch_import_it() -> None:
    heavy = {path.name for room, path in sources() if room == "runtime" and imported(path) & {"torch", "transformers"}}
    assert heavy == {"transformers.py", "vllm_offline.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_do_not_import_each_other(room: str) -> None:
    for owner, path in sources():
        if owner != room:
            continue
        for other in ROOMS:
            if other != room:
                assert not [name for name in imported(path) if name.startswith(f"flashvlm_export.{other}")], path


def test_the_contract_does_not_import_the_rooms() -> None:
    """Only the command line and the report do, and only inside functions, so that each verb loads what it needs."""
    for owner, path in sources():
        if owner in ROOMS:
            continue
        names = {name for name in imported(path) if any(name.startswith(f"flashvlm_export.{room}") for room in ROOMS)}
        if owner not in ("cli", "report"):
            assert not names, path
            continue
        top_level = {
            node.module
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ImportFrom) and node.module
        }
        assert not names & top_level, path


def test_packages_are_the_folders() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(re.findall(r'^    "([a-z_.]+)",$', text.partition("packages = [")[2].partition("]")[0], re.MULTILINE))
    folders = {"optimum.commands.register"}
    for base, prefix in ((ROOT / "flashvlm_export", ""), *((ROOT / room, f".{room}") for room in ROOMS)):
        for init in base.rglob("__init__.py"):
            parts = init.parent.relative_to(base).parts
            if base.name == "flashvlm_export" and parts and parts[0] in ROOMS:
                continue
            folders.add(".".join([f"flashvlm_export{prefix}", *parts]))
    assert listed == folders


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_reached_through_relative_links(room: str) -> None:
    link = ROOT / "flashvlm_export" / room
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{room}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that no build folder is left in the source tree."""
    pytest.importorskip("build", reason="building a wheel needs the package build")
    directory = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT, directory / "source", symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info")
    )
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, directory / "source"],
        check=True,
        capture_output=True,
    )
    (built,) = directory.glob("*.whl")
    return built


def test_wheel_holds_the_rooms_under_one_name(wheel: Path) -> None:
    """Nothing called export, runtime or calibration reaches site-packages."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flashvlm_export", "optimum"}
    assert [name for name in names if name.startswith("optimum")] == ["optimum/commands/register/flashvlm.py"]
    assert len([name for name in names if name.endswith("/errors.py")]) == 1
    scripts = {name for name in names if name.startswith("flashvlm_export/export/device/")}
    assert {name.rpartition("/")[2] for name in scripts} == {"README.md", "build.sh", "install.sh"}
    page = {name for name in names if name.startswith("flashvlm_export/runtime/server/page/")}
    assert {name.rpartition("/")[2] for name in page} == {
        file.name for file in (ROOT / "runtime/server/page").iterdir()
    }
    modules = {name for name in names if name.startswith("flashvlm_export/") and name.endswith(".py")}
    on_disk = {
        str(path.relative_to(ROOT / "flashvlm_export")) if room not in ROOMS else f"{path.relative_to(ROOT)}"
        for room, path in sources()
    }
    assert {name.removeprefix("flashvlm_export/") for name in modules} == on_disk


def test_optimum_cli_finds_the_command_of_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum", reason="optimum-cli belongs to optimum")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # The tests' own environment may hold an editable install of this project, which registers the command too.
    script = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        "sys.path = [p for p in sys.path if '__editable__' not in p]\n"
        "from optimum.commands.optimum_cli import main\n"
        "main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script, "export", "flashvlm"]
    run = functools.partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    shown = run([*command, "--help"])
    assert shown.returncode == 0, shown.stderr
    assert "--diversity {bipartite,farthest}" in shown.stdout
    refused = run([*command, "no-such-model", "--output", "bundle"])
    assert refused.returncode == 2
    assert "unknown model" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_importing_the_runtime_takes_neither_torch_nor_transformers() -> None:
    modules = [
        "flashvlm_export." + ".".join(("runtime", *path.relative_to(ROOT / "runtime").with_suffix("").parts))
        for path in sorted((ROOT / "runtime").rglob("*.py"))
        if path.name != "__init__.py"
    ]
    assert "flashvlm_export.runtime.pipeline" in modules
    script = (
        "import importlib, sys\n"
        f"for name in {[*modules, 'flashvlm_export.cli']!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_links_in_the_documents_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    assert links
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_readme_commands_exist() -> None:
    """Every `make TARGET` and `flashvlm VERB` of the README is real."""
    from flashvlm_export.cli import build_parser

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z-]+)", readme))
    assert {"demo", "test"} <= named <= targets
    lines = re.findall(r"^flashvlm (.*?)(?:\s+#.*)?$", readme, re.MULTILINE)
    verbs = {build_parser().parse_args(shlex.split(line)).verb for line in lines}
    assert verbs == {
        "models",
        "targets",
        "export",
        "calibrate",
        "build",
        "pack",
        "export-triton",
        "inspect",
        "report",
        "run",
        "chat",
        "live",
        "serve",
        "prompt",
        "dataset",
        "eval",
    }
