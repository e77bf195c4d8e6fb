"""Build fastres: the package, its Triton kernels, and two C++ libraries.

libfastres.so has the ops and needs no Python, so that C++ programs can load it; fastres._C is the
Python module in front of it. They use the LibTorch Stable ABI: the binaries work with every torch
>= 2.10, whichever was there when they were built. Instruction sets are chosen at run time, so they
work on every CPU of their architecture as well. The module is one Python version's; with
FASTRES_LIBRARY, the path of a libfastres.so, it alone is built for another one.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# The library of the ops. Every source is its own but that of the Python module.
LIBRARY = "fastres.libfastres"
MODULE_SOURCE = "csrc/module.cpp"
TORCH_REQUIREMENT = "torch>=2.10"
# The oldest torch whose Stable ABI the binary asks for: 2.10.
TORCH_TARGET_VERSION = "0x020a000000000000"
# One source of kernels, compiled once per instruction set.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    *(*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
]
INSTRUCTION_SET_FLAGS = {
    "kernels_avx2.cpp": AVX2_FLAGS,
    "kernels_avx512.cpp": AVX512_FLAGS,
    "kernels_amx.cpp": [
        *AVX512_FLAGS,
        "-mavx512vbmi",
        "-mavx512bf16",
        "-mamx-tile",
        "-mamx-bf16",
        "-mamx-int8",
    ],
}


def installed_torch() -> Path | None:
    """The folder of the torch package that this interpreter has, if any.

    Under pip's build isolation the running interpreter's own packages are hidden but still there:
    looking for them saves a second download of torch just to build against its headers.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    for scheme in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(scheme)) / "torch"
        if (folder / "__init__.py").exists():
            return folder
    return None


def torch_version(folder: Path) -> str:
    for distribution in importlib.metadata.distributions(name="torch", path=[str(folder.parent)]):
        return distribution.version
    raise SystemExit(f"fastres: the torch in {folder} has no metadata: reinstall torch")


def compiler() -> str:
    """The C++ compiler, or one clear message that says what to install."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        path = shutil.which(name.split()[0]) if name else None
        if path:
            return path
    raise SystemExit(
        "\nfastres: no C++ compiler was found, and building fastres from source needs one.\n"
        "  Debian, Ubuntu:  apt-get install g++\n"
        "  Fedora, RHEL:    dnf install gcc-c++\n"
        "  conda:           conda install -c conda-forge cxx-compiler\n"
        "Then run the same command again (or point CXX at a compiler that supports C++20).\n"
        "A wheel that was built elsewhere with 'pip wheel .' needs no compiler.\n"
    )


class NinjaBuild(build_ext):
    """Compile with ninja: in parallel, only what changed, with flags per file."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname in (LIBRARY, LIBRARY.split(".")[-1]):  # setuptools asks for both
            return f"{fullname.replace('.', os.sep)}.so"  # no Python's version: none is needed
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        cxx = compiler()
        torch = installed_torch()
        if torch is None:
            raise SystemExit(f"fastres: building needs {TORCH_REQUIREMENT}: pip install torch")
        version = torch_version(torch)
        if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (2, 10):
            raise SystemExit(f"fastres: building needs {TORCH_REQUIREMENT}, but torch is {version}")

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == LIBRARY and (built := os.environ.get("FASTRES_LIBRARY")):
            shutil.copyfile(built, output)
            return
        work = Path(self.build_temp).resolve() / ext.name
        work.mkdir(parents=True, exist_ok=True)
        includes = [
            f"-I{ROOT / 'csrc'}",
            # Before torch: the copy of it in torch 2.10 refuses the stable ABI.
            f"-isystem {pybind11.get_include()}",
            f"-isystem {torch / 'include'}",
            f"-isystem {torch / 'include/torch/csrc/api/include'}",
            f"-isystem {sysconfig.get_path('include')}",
        ]
        flags = [
            *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
            *("-g0", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"),
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            f'-DFASTRES_BUILT_WITH_TORCH=\\"{version}\\"',
            *os.environ.get("CXXFLAGS", "").split(),
        ]
        link = ["-shared", "-Wl,--exclude-libs,ALL"]
        if ext.name == LIBRARY:
            link += [f"-Wl,-soname,{output.name}", f"-L{torch / 'lib'}", "-ltorch_cpu"]
        else:
            # Ninja makes $ of $$, and the shell keeps it.
            link += [str(output.with_name("libfastres.so")), "-Wl,-rpath,'$$ORIGIN'"]

        x86 = platform.machine() in ("x86_64", "AMD64")
        with (work / "build.ninja").open("w") as file:
            out = ninja.ninja_syntax.Writer(file, width=10000)
            out.rule(
                "compile",
                f"{cxx} -MD -MF $out.d {' '.join(includes)} {' '.join(flags)} $isa -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="c++ $in",
            )
            out.rule("link", f"{cxx} $in {' '.join(link)} -o $out", description="link $out")
            objects = []
            for source in ext.sources:
                target = str(work / Path(source).with_suffix(".o"))
                isa = INSTRUCTION_SET_FLAGS.get(Path(source).name, []) if x86 else []
                variables = {"isa": " ".join(isa)}
                objects += out.build(target, "compile", str(ROOT / source), variables=variables)
            out.build(str(output), "link", objects)
            out.default(str(output))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(work)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit("fastres: the C++ extension did not compile; the errors are above")


def build_requirements() -> list[str]:
    """torch, where it is not there to build against."""
    if installed_torch() is not None or {"sdist", "clean"} & set(sys.argv):
        return []
    compiler()  # Say what is missing before a download of gigabytes, not after it.
    return [TORCH_REQUIREMENT]


version = re.search(r'__version__ = "(.+)"', (ROOT / "fastres/version.py").read_text())
assert version is not None
SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
packages = ["fastres.kernels", "fastres"] + [
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in (ROOT / "fastres").glob("*/__init__.py")
]
# What `fastres export --format onnx` needs, and the runtime that checks its file.
onnx = ["onnx", "onnxscript", "onnxruntime"]
# What `fastres train --tensorboard` needs.
tensorboard = ["tensorboard"]
# Whose models `fastres.fuse_model` is tested and measured with.
models = ["timm>=1.0", "transformers>=4.46"]
test = [
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-timeout>=2.3",
    # It builds examples/cpp.
    "cmake>=3.18",
    *onnx,
    *tensorboard,
    *models,
]
bench = [
    *models,
    "pytest-benchmark>=4",
    "pytest>=8",
    *onnx,
    "openvino",
    "ncnn",
    # No wheels for Linux on ARM.
    "pnnx; platform_machine != 'aarch64'",
    "MNN; platform_machine != 'aarch64'",
]
# A cross compiler, with which tests/test_portability.py compiles the C++ sources for aarch64.
cross = ["ziglang>=0.17", "pybind11>=2.13"]
# What tools/compat.py makes its environments with.
compat = ["uv>=0.9"]
examples = ["lightning>=2.4", "transformers>=4.46", "accelerate>=1.1"]
# The documentation site: python -m sphinx docs build/site
docs = ["sphinx>=8", "myst-parser>=4", "pydata-sphinx-theme>=0.16", "sphinx-copybutton>=0.5"]
lint = ["ruff>=0.6", "mypy>=1.11", "clang-format>=18", "codespell>=2.3", "pre-commit>=3.8"]

setup(
    name="fastres",
    version=version.group(1),
    description="ResNets made fast without changing their answers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=packages,
    package_dir={"fastres.kernels": "kernels"},
    package_data={
        "fastres": ["py.typed", "*.pyi"],
        "fastres.data": ["sample/*"],
        "fastres.kernels": ["tuned/*.json"],
        "fastres.report": ["*.html"],
    },
    ext_modules=[
        Extension(LIBRARY, sorted(SOURCES - {MODULE_SOURCE})),
        Extension("fastres._C", [MODULE_SOURCE]),  # links to the library
    ],
    cmdclass={"build_ext": NinjaBuild},
    setup_requires=build_requirements(),
    install_requires=[
        TORCH_REQUIREMENT,
        "torchvision",
        "triton; platform_system == 'Linux'",
        "jinja2>=3",
        "numpy",
        "pillow",
        "matplotlib",
        "rich>=13",
        "tyro>=0.9",
    ],
    extras_require={
        "onnx": onnx,
        "tensorboard": tensorboard,
        "test": test,
        "bench": bench,
        "examples": examples,
        "docs": docs,
        "cross": cross,
        "dev": [*test, *bench, *examples, *docs, *lint, *cross, *compat],
    },
    entry_points={"console_scripts": ["fastres = fastres.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: C++",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
