"""The architecture as a test: rooms import downward only, and what must start fast stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "snapd"

# From the ground up (docs/architecture.md); a room may import itself and every room before it.
ROOMS = ("block", "proc", "cow", "dmuser", "merge", "worker", "device", "manager", "api", "rpc", "client", "ctl")


def imports_of(path: Path) -> set[str]:
    """The snapd rooms that one module imports, also inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        rooms |= {name.split(".")[1] for name in names if name.startswith("snapd.")}
    return rooms


def test_every_folder_is_a_known_room() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_downward(room: str) -> None:
    below = set(ROOMS[: ROOMS.index(room) + 1])
    for path in (PACKAGE / room).rglob("*.py"):
        upward = imports_of(path) - below
        assert not upward, f"{path.relative_to(PACKAGE)} imports upward: {sorted(upward)}"


@pytest.mark.parametrize("module", ["snapd.worker.__main__", "snapd.device.__main__"])
def test_block_servers_start_without_heavy_modules(module: str) -> None:
    code = f"import {module}, sys; print(' '.join(m for m in ('grpc', 'asyncio', 'numpy') if m in sys.modules))"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
