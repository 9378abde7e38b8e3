"""The committed stubs are what the .proto files generate."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_stubs_match_the_protos(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "protos" / "generate.py"), str(tmp_path)], check=True, capture_output=True
    )
    committed = {path.name: path.read_text() for path in (ROOT / "snapd/api/v1").glob("*_pb2*")}
    generated = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert generated.keys() == committed.keys()
    assert [name for name in generated if generated[name] != committed[name]] == []
