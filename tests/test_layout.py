"""The import rules of the architecture: arrows point one way.

cli -> export -> train -> models -> nn -> ops; train -> data. `kernels/` imports only torch and
triton and registers nothing; the C++ kernels' loops include no torch header.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each room may import itself and the rooms listed here.
ALLOWED = {
    "version": set(),
    "_C": set(),
    "library": {"_C"},
    "backends": {"_C"},
    "ops": {"_C"},
    "nn": {"backends", "ops"},
    "models": {"nn", "ops"},
    "fuse": {"models", "nn", "ops"},
    "data": set(),
    "train": {"_C", "data", "models", "version"},
    "export": {"train", "version"},
    "report": {"train", "version"},
    "cuda_graph": set(),
    "kernels": set(),
    "tune": {"kernels", "models", "ops", "version"},
    "env": {"_C", "backends", "library", "ops", "tune", "version"},
    "cli": {"train", "export", "report", "data", "models", "env", "tune", "version"},
}


def imports(path: Path, package: str) -> set[str]:
    """The modules that a file imports, relative imports made absolute."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(parent) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from fastres import ops` imports fastres.ops.
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names if module == "fastres" else {module}
    return found


def package_files() -> list[Path]:
    return sorted((ROOT / "fastres").rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "fastres").with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize(
    "path", package_files(), ids=lambda p: str(p.relative_to(ROOT / "fastres"))
)
def test_imports_point_one_way(path: Path) -> None:
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    assert here in ALLOWED, f"a new room: say in this test what {here} may import"
    package = ".".join(path.parent.relative_to(ROOT).parts)
    for module in imports(path, package):
        parts = module.split(".")
        if parts[0] != "fastres" or len(parts) == 1:
            continue
        assert parts[1] in ALLOWED[here] | {here}, f"{here} must not import {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_only_torch_and_triton_and_register_nothing(path: Path) -> None:
    standard = {"__future__", "collections", "contextlib", "dataclasses", "functools", "json",
                "math", "os", "pathlib", "threading", "typing", "warnings"}  # fmt: skip
    roots = {module.split(".")[0] for module in imports(path, "fastres.kernels")}
    outside = roots - standard - {"torch", "triton"}
    within = {m for m in imports(path, "fastres.kernels") if m.startswith("fastres")}
    assert outside <= {"fastres"}, f"{path.name} imports {outside}"
    assert all(m.startswith("fastres.kernels") for m in within), within
    assert not re.search(r"torch\.library|register_kernel|\.impl\(", path.read_text())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "csrc" / "cpu").glob("*.inl")), ids=lambda p: p.name
)
def test_kernel_loops_include_no_torch_header(path: Path) -> None:
    included = re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text())
    assert not [name for name in included if "torch" in name or "ATen" in name or "c10" in name]


def test_every_schema_is_defined_once_and_has_a_reference() -> None:
    from fastres.ops import reference
    from fastres.ops._register import OPS

    text = (ROOT / "csrc" / "register.cpp").read_text()
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', text)
    assert sorted(defined) == sorted(OPS)
    assert all(callable(getattr(reference, name)) for name in OPS)


def test_no_machine_specific_build_flags() -> None:
    """A wheel runs on other machines: what this one has is found out at run time."""
    for path in (ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "csrc").rglob("*.*")):
        assert not re.search(r"-m(arch|cpu|tune)[= ]*native", path.read_text()), path
