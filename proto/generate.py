"""Generates the Python stubs beside the .proto files; with --check, says whether the committed ones match.

The path below proto/ equals the protobuf package, so generated imports need no fixing:
`from prelay.v1 import worker_pb2`.
"""

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate(out: Path) -> None:
    """Writes the stubs of every .proto file below `out`, mirroring their folders."""
    protos = sorted(str(path) for path in ROOT.glob("prelay/**/*.proto"))
    args = [f"-I{ROOT}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    # protoc's own well-known types (duration.proto) live inside grpc_tools.
    args.append(f"-I{Path(protoc.__file__).parent / '_proto'}")
    if protoc.main(["protoc", *args, *protos]) != 0:
        sys.exit("protoc failed; its message is above")


def stubs(root: Path) -> dict[Path, bytes]:
    files = (path for path in root.glob("prelay/**/*") if path.name.endswith(SUFFIXES))
    return {path.relative_to(root): path.read_bytes() for path in files}


def check() -> None:
    """Exits with 1 and the names of stubs that differ from what their .proto files give."""
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        want, have = stubs(Path(fresh)), stubs(ROOT)
    differing = sorted(str(path) for path in want.keys() | have.keys() if want.get(path) != have.get(path))
    if differing:
        sys.exit(
            f"stubs do not match their .proto files: {', '.join(differing)}; run `make protos` and commit"
        )
    print(f"{len(want)} stubs match their .proto files")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    elif not sys.argv[1:]:
        generate(ROOT)
    else:
        sys.exit("usage: python proto/generate.py [--check]")
