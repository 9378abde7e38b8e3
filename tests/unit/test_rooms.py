"""The architecture as a test: rooms import downward only, and what must start fast stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "snapd"

# From the ground up (docs/architecture.md); a room may import itself and every room before it.
ROOMS = ("block", "proc", "cow", "dmuser", "merge", "worker", "device", "manager", "api", "rpc", "client", "ctl")


# The same inside the COW room, whose own modules are the ground.
COW_FOLDERS = ("image", "parse", "write", "diff", "verbs")


def imports_of(path: Path) -> set[str]:
    """The snapd modules that one module imports, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        modules |= {name for name in names if name.startswith("snapd.")}
    return modules


def test_every_folder_is_a_known_room() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_downward(room: str) -> None:
    below = set(ROOMS[: ROOMS.index(room) + 1])
    for path in (PACKAGE / room).rglob("*.py"):
        upward = {name.split(".")[1] for name in imports_of(path)} - below
        assert not upward, f"{path.relative_to(PACKAGE)} imports upward: {sorted(upward)}"


@pytest.mark.parametrize("folder", COW_FOLDERS)
def test_imports_inside_the_cow_room_go_downward(folder: str) -> None:
    found = {path.name for path in (PACKAGE / "cow").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == set(COW_FOLDERS)
    above = set(COW_FOLDERS[COW_FOLDERS.index(folder) + 1 :])
    for path in (PACKAGE / "cow" / folder).rglob("*.py"):
        upward = {name for name in imports_of(path) if name.startswith("snapd.cow.") and name.split(".")[2] in above}
        assert not upward, f"{path.relative_to(PACKAGE)} imports upward: {sorted(upward)}"


@pytest.mark.parametrize("module", ["snapd.worker.__main__", "snapd.device.__main__"])
def test_block_servers_start_without_heavy_modules(module: str) -> None:
    code = f"import {module}, sys; print(' '.join(m for m in ('grpc', 'asyncio', 'numpy') if m in sys.modules))"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
