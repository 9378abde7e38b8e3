"""Generate the stubs in snapd/api/v1 from the .proto files here.

    python protos/generate.py [OUTPUT_DIRECTORY]

The proto package is `snapd.v1`, the Python package `snapd.api.v1`: imports are rewritten accordingly.
"""

import os
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
OUTPUT = PROTOS.parent / "snapd" / "api" / "v1"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


def generate(output: Path) -> None:
    """Write every stub to `output`."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [f"-I{PROTOS}", f"-I{WELL_KNOWN}"]
        arguments += [f"--{kind}_out={scratch}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
        # protoc looks for its plugins on the path; they are installed beside this interpreter.
        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        files = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "snapd").rglob("*.proto"))
        if protoc.main(["protoc", *arguments, *files]):
            raise SystemExit("protoc failed")
        output.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(scratch, "snapd", "v1").iterdir()):
            text = path.read_text()
            (output / path.name).write_text(text.replace("from snapd.v1 import", "from snapd.api.v1 import"))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
