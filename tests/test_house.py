"""The house rules that a machine can hold: imports point downwards, start-up stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mergekit_moe"
GROUND = {
    *("errors", "image_recipe", "label_recipe", "privacy_recipe", "recipe", "recipe_file", "router_recipe"),
    *("seed_recipe", "source_recipe", "spec", "task_recipe", "workspace"),
}
MATERIAL = {
    *("adapters", "architectures", "checkpoint", "data", "experts", "hub", "images", "installed_images"),
    *("installed_text", "matching", "models", "privacy", "structure", "tasks", "templates", "training", "updates"),
    "weights",
}
STAGES = {"alignment", "cards", "evaluation", "export", "merging", "publication", "routing", "seed", "selection"}
TOP = {
    *("auditing", "carding", "cli", "comparing", "exporting", "finding", "harness", "job", "members", "methods"),
    *("plan", "pipeline", "protecting", "pushing", "selecting", "__main__"),
}
MODELING = {"modeling"}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the rooms that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mergekit_moe"):
            below = (node.module or "").split(".")[1:]
            found |= {below[0]} if below else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in names if parts[0] == "mergekit_moe" and len(parts) > 1}
    return {name for name in found if name != "__version__"}


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_module_has_a_room() -> None:
    assert {room(path) for path in MODULES} == GROUND | MATERIAL | STAGES | TOP | MODELING


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = room(path)
    allowed = {
        **dict.fromkeys(GROUND, GROUND),
        **dict.fromkeys(MATERIAL, GROUND | MATERIAL | MODELING),
        **dict.fromkeys(STAGES, GROUND | MATERIAL | MODELING),
        **dict.fromkeys(TOP, GROUND | MATERIAL | MODELING | STAGES | TOP),
        "modeling": set(),
    }[own]
    assert imports(path) - {own} <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def test_the_shipped_model_code_needs_only_torch_and_transformers() -> None:
    for path in (PACKAGE / "modeling").glob("*_metamoe.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in {"collections", "torch", "transformers", "typing"}
            if isinstance(node, ast.Import):
                standard = {"functools", "inspect", "re"}
                assert {a.name.split(".")[0] for a in node.names} <= standard | {"torch", "transformers"}


def test_nothing_is_loaded_that_could_run_a_checkpoint_s_own_code() -> None:
    """Left out, `trust_remote_code` asks on stdin. PEFT has no such thing: it is given the loaded base."""
    loaders = 0
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called == "SentenceTransformer" or called.endswith(".from_pretrained"):
                loaders += 1
                safe = called == "PeftModel.from_pretrained" or "trust_remote_code=False" in ast.unparse(node)
                assert safe, (path, node.lineno)
    assert loaders >= 5


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom mergekit_moe.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'sklearn', 'numpy', 'pandas'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_check_imports_no_model_code(tmp_path: Path) -> None:
    from test_pipeline import tiny_recipe

    recipe = tiny_recipe(tmp_path)
    script = (
        "import sys\nfrom mergekit_moe.cli import main\n"
        "try:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code\n"
        "heavy = {'torch', 'peft', 'sklearn', 'sentence_transformers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "check", recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
