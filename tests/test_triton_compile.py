"""Triton's kernels compiled for GPUs that need not be there, and what the machine code must hold:
no register spills, tensor cores where there is a dot, shared memory within the chip's limit.
"""

import importlib
import itertools
import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fastres.kernels._launch import row_tile, rows_of

add_relu = importlib.import_module("fastres.kernels.add_relu")
bn_add_relu = importlib.import_module("fastres.kernels.bn_add_relu")
channel_stats = importlib.import_module("fastres.kernels.channel_stats")
choice = importlib.import_module("fastres.kernels.choice")
tiles = importlib.import_module("fastres.kernels._tiles")
conv = importlib.import_module("fastres.kernels.conv")
conv_1x1 = importlib.import_module("fastres.kernels.conv_1x1")
conv_backward = importlib.import_module("fastres.kernels.conv_backward")
conv_gradients = importlib.import_module("fastres.kernels.conv_gradients")
max_pool2d = importlib.import_module("fastres.kernels.max_pool2d")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}
TENSOR_CORE = {"sm_80": r"\bHMMA\.", "sm_90": r"\bHGMMA\.", "gfx942": r"\bv_mfma_"}
POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
# Arguments that are neither tensors of the activations' dtype nor compile-time constants.
INTEGERS = ["rows", "tiles", "parts", "channels", "numel", "tile_rows", "part_rows", "group"]
INTEGERS += ["phase_rows", "split_rows"]
INTEGERS += ["height", "width", "in_channels", "out_height", "out_width", "out_channels", "depth"]
ACTIVATIONS = ["input", "weight", "residual", "output", "dy", "y", "z", "dz", "dresidual", "dinput"]
ACTIVATIONS += ["folded", "shift"]


def compile_for(
    kernel: triton.JITFunction,
    target: str,
    dtype: torch.dtype,
    constants: dict[str, object],
    num_warps: int,
    num_stages: int = 3,
    activations: list[str] = ACTIVATIONS,
    descriptors: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    odd: Collection[str] = (),
) -> CompiledKernel:
    """Compile as a launch with 16-byte aligned tensors and channels in sixteens would.

    `descriptors` are the arguments that are tensor descriptors, and their blocks; of `odd` ones,
    channels or tensors, nothing is known.
    """
    vectors = POINTER[torch.float64 if dtype == torch.float64 else torch.float32]
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        assert not name.isupper(), f"{name} has no value"
        if name in descriptors:
            rows, columns = descriptors[name]
            signature[name] = f"tensordesc<{POINTER[dtype].removeprefix('*')}[{rows}, {columns}]>"
            continue
        if name in INTEGERS:
            signature[name] = "i32"
        elif name == "taps":
            signature[name] = "*u8"
        else:
            signature[name] = POINTER[dtype] if name in activations else vectors
        if name not in odd and (name.endswith("channels") or name not in INTEGERS):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if TARGETS[target].backend == "hip" and "amd" not in triton.backends.backends:
        pytest.skip("this triton has no compiler for AMD")
    return triton.compile(source, TARGETS[target], options)


def machine_code(compiled: CompiledKernel, target: str, folder: Path) -> tuple[str, int]:
    """The instructions as text, and how many registers were spilled."""
    if TARGETS[target].backend == "hip":
        text = compiled.asm["amdgcn"]
        counts = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s+(\d+)", text)
        assert len(counts) == 2
        return text, sum(map(int, counts))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sass, len(re.findall(r"\b(?:STL|LDL)\b", sass))


def assert_good_code(
    compiled: CompiledKernel, target: str, tensor_cores: bool, folder: Path
) -> None:
    code, spills = machine_code(compiled, target, folder)
    assert re.search(r"\bEXIT\b|\bs_endpgm\b", code), "no machine code"
    assert not spills, f"{spills} register spills"
    assert bool(re.search(TENSOR_CORE[target], code)) == tensor_cores
    assert compiled.metadata.shared <= SHARED_MEMORY[target]


EPILOGUE = ["running_mean", "running_var", "bias", "bn_weight", "bn_bias", "residual"]
PROLOGUE = ["in_mean", "in_var", "in_weight", "in_bias"]
PARTIALS = ["part_mean", "part_m2"]
ABSENT = {
    "inference": PROLOGUE + PARTIALS,
    "training": PROLOGUE + EPILOGUE,
    "training with prologue": EPILOGUE,
}


# Kernel's size, stride and whether Ci is a multiple of the tile's depth; and 64-bit offsets.
SHAPES = {
    "3x3": (3, 1, True, False),
    "1x1": (1, 1, True, False),
    "3x3 stride 2": (3, 2, True, False),
    "1x1 stride 2": (1, 2, True, False),
    "ragged depth": (3, 1, False, False),
    "wide offsets": (3, 1, True, True),
}


def conv_cases() -> list[tuple[str, str, str, torch.dtype, str]]:
    """Every tile of every target in every mode; what differs little in one mode of each tile."""
    cases = []
    for target, tile, mode in itertools.product(TARGETS, tiles.CONV_TILES, ABSENT):
        for dtype, shape in itertools.product(DTYPES, SHAPES):
            prologue = mode == "training with prologue"
            if not choice.tile_fits(tile, dtype, prologue, target):
                continue
            if not choice.has_tensor_cores(target, PRECISION[dtype]):
                continue
            usual = shape == "3x3" and dtype != torch.float16
            # What differs little is compiled once a tile, in its fullest mode.
            once = (mode, dtype, shape) in ONCE
            marks = [] if usual or once else [pytest.mark.every_configuration]
            cases.append(pytest.param(target, tile, mode, dtype, shape, marks=marks))
    return cases


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PRECISION = {torch.bfloat16: "16-bit", torch.float16: "16-bit", torch.float32: "tf32"}
ONCE = {
    ("inference", torch.float16, "1x1"),
    ("inference", torch.bfloat16, "wide offsets"),
    ("training with prologue", torch.bfloat16, "ragged depth"),
}


@pytest.mark.parametrize(
    ("target", "tile", "mode", "dtype", "shape"), conv_cases(), ids=lambda value: str(value)
)
def test_convolution(
    target: str, tile: str, mode: str, dtype: torch.dtype, shape: str, tmp_path: Path
) -> None:
    config = tiles.conv_tile(tile, target)
    size, stride, even, wide = SHAPES[shape]
    constants = {
        **dict.fromkeys(ABSENT[mode]),
        "KERNEL_H": size,
        "KERNEL_W": size,
        "STRIDE_H": stride,
        "STRIDE_W": stride,
        "PADDING_H": size // 2,
        "PADDING_W": size // 2,
        "IN_EPS": 1e-5,
        "EPS": 1e-5,
        "RELU": mode == "inference",
        "LINES": False,
        "EVEN_DEPTH": even,
        "WIDE": wide,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_DEPTH": config.block_depth(dtype),
        "GROUP_ROWS": conv.GROUP_ROWS,
    }
    compiled = compile_for(
        conv.conv_fwd_kernel,
        target,
        dtype,
        constants,
        config.num_warps,
        config.num_stages,
        ["input", "weight", "output", "residual"],
    )
    assert_good_code(compiled, target, True, tmp_path)


def stem_cases() -> list[tuple[str, str, str, torch.dtype, int]]:
    """The stems of both kinds of images, without a prologue."""
    cases = []
    for target, tile, mode in itertools.product(TARGETS, tiles.STEM_TILES, list(ABSENT)[:2]):
        for dtype, size in itertools.product(DTYPES, (7, 3)):
            if choice.has_tensor_cores(target, PRECISION[dtype]):
                usual = (mode, dtype, size) == ("training", torch.bfloat16, 7)
                marks = [] if usual else [pytest.mark.every_configuration]
                cases.append(pytest.param(target, tile, mode, dtype, size, marks=marks))
    return cases


@pytest.mark.parametrize(("target", "tile", "mode", "dtype", "size"), stem_cases(), ids=str)
def test_stem(
    target: str, tile: str, mode: str, dtype: torch.dtype, size: int, tmp_path: Path
) -> None:
    """Of images with three channels, with one, which Triton compiles as a constant, and of many."""
    config = tiles.tile_of_8_warps(tile, target)
    constants = {
        **dict.fromkeys(ABSENT[mode]),
        **dict.fromkeys(("KERNEL_H", "KERNEL_W"), size),
        **dict.fromkeys(("STRIDE_H", "STRIDE_W"), 2 if size == 7 else 1),
        **dict.fromkeys(("PADDING_H", "PADDING_W"), size // 2),
        "IN_EPS": 1e-5,
        "EPS": 1e-5,
        "RELU": mode == "inference",
        "LINES": True,
        "EVEN_DEPTH": False,
        "WIDE": False,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_DEPTH": 32,
        "GROUP_ROWS": conv.GROUP_ROWS,
    }
    for other in ({}, {"in_channels": 1}, {"WIDE": True}):
        compiled = compile_for(
            conv.conv_fwd_kernel,
            target,
            dtype,
            {**constants, **other},
            config.num_warps,
            config.num_stages,
            ["input", "weight", "output", "residual"],
            odd=["in_channels"],
        )
        assert_good_code(compiled, target, True, tmp_path)


def pointwise_cases() -> list[tuple[str, str, torch.dtype, bool]]:
    """Every tile in every mode by TMA, which sm_90 alone has here."""
    cases = []
    for tile, mode in itertools.product(tiles.CONV_TILES, ABSENT):
        for dtype, wide in itertools.product(DTYPES[:2], (False, True)):
            usual = (mode, dtype, wide) == ("training with prologue", torch.bfloat16, False)
            marks = [] if usual else [pytest.mark.every_configuration]
            cases.append(pytest.param(tile, mode, dtype, wide, marks=marks))
    return cases


@pytest.mark.parametrize(("tile", "mode", "dtype", "wide"), pointwise_cases(), ids=str)
def test_pointwise_convolution_by_tma(
    tile: str, mode: str, dtype: torch.dtype, wide: bool, tmp_path: Path
) -> None:
    config = tiles.conv_tile(tile, "sm_90")
    depth = config.block_depth(dtype)
    constants = {
        **dict.fromkeys(ABSENT[mode]),
        "IN_EPS": 1e-5,
        "EPS": 1e-5,
        "RELU": mode == "inference",
        "WIDE": wide,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_DEPTH": depth,
        "GROUP_ROWS": conv.GROUP_ROWS,
    }
    compiled = compile_for(
        conv_1x1.conv_1x1_fwd_kernel,
        "sm_90",
        dtype,
        constants,
        config.num_warps,
        config.num_stages,
        ["output", "residual"],
        {"input": (config.block_rows, depth), "weight": (config.block_columns, depth)},
    )
    assert_good_code(compiled, "sm_90", True, tmp_path)
    assert re.search(r"\bUTMALDG\b", machine_code(compiled, "sm_90", tmp_path)[0])


STATISTICS = ["z", "mean", "dmean", "dvar"]
# Of each mode what is absent, and the shapes that it has.
GRADIENT_MODES = {
    "plain": ([*STATISTICS, *PROLOGUE], ["3x3", "1x1", "3x3 stride 2", "1x1 stride 2"]),
    "prologue": (STATISTICS, list(SHAPES)),
    "apply": ([], ["1x1", "1x1 stride 2"]),
}
GRADIENT_KERNELS = {
    "dgrad": conv_gradients.conv_dgrad_kernel,
    "wgrad": conv_gradients.conv_wgrad_kernel,
}


def gradient_cases() -> list[tuple[str, str, str, str, torch.dtype, str]]:
    """Every tile of every target in every mode; see conv_cases."""
    cases = []
    for target, kernel in itertools.product(TARGETS, GRADIENT_KERNELS):
        for tile, mode in itertools.product(tiles.GRADIENT_TILES, GRADIENT_MODES):
            for dtype, shape in itertools.product(DTYPES, GRADIENT_MODES[mode][1]):
                if not choice.has_tensor_cores(target, PRECISION[dtype]):
                    continue
                # What is usual is compiled for each tile in one mode, the fullest for the largest.
                usual = (mode, dtype, shape) == ("prologue", torch.bfloat16, "3x3") or (
                    (mode, tile, shape) == ("apply", "square", "1x1")
                )
                marks = [] if usual else [pytest.mark.every_configuration]
                cases.append(pytest.param(target, kernel, tile, mode, dtype, shape, marks=marks))
    return cases


@pytest.mark.parametrize(
    ("target", "kernel", "tile", "mode", "dtype", "shape"), gradient_cases(), ids=str
)
def test_gradient(
    target: str, kernel: str, tile: str, mode: str, dtype: torch.dtype, shape: str, tmp_path: Path
) -> None:
    config = tiles.tile_of_8_warps(tile, target)
    size, stride, even, wide = SHAPES[shape]
    depth = config.block_depth(dtype)
    if kernel == "wgrad":
        depth = config.block_depth_of_pixels(dtype, wide)
    absent = [*GRADIENT_MODES[mode][0]]
    if kernel == "dgrad" and mode == "plain":
        absent += ["input", "part_g", "part_gz"]
    constants = {
        **dict.fromkeys(absent),
        "KERNEL_H": size,
        "KERNEL_W": size,
        "STRIDE_H": stride,
        "STRIDE_W": stride,
        "PADDING_H": size // 2,
        "PADDING_W": size // 2,
        "IN_EPS": 1e-5,
        "EVEN_DEPTH": even,
        "WIDE": wide,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_DEPTH": depth,
        "GROUP_ROWS": conv.GROUP_ROWS,
    }
    function = GRADIENT_KERNELS[kernel]
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    compiled = compile_for(
        function,
        target,
        dtype,
        constants,
        config.num_warps,
        config.num_stages,
        ["dz", "z", "weight", "dinput", "input"],
    )
    assert_good_code(compiled, target, True, tmp_path)


STEM_POOL = {
    **dict.fromkeys(("KERNEL_H", "KERNEL_W"), 3),
    **dict.fromkeys(("STRIDE_H", "STRIDE_W"), 2),
    **dict.fromkeys(("PADDING_H", "PADDING_W"), 1),
    "IN_EPS": 1e-5,
}
RESIDUAL_BN = ["residual_mean", "residual_var", "residual_weight", "residual_bias"]
# name: kernel, warps, elements of a tile (0: not a tile of rows), absent arguments, constants
ELEMENTWISE = {
    "add_relu": (add_relu.add_relu_fwd_kernel, 4, 0, [], {"BLOCK": add_relu.BLOCK}),
    "add_relu_backward": (add_relu.add_relu_bwd_kernel, 4, 0, [], {"BLOCK": add_relu.BLOCK}),
    "bn_relu": (bn_add_relu.bn_add_relu_fwd_kernel, 8, 4096, ["residual", *RESIDUAL_BN], {}),
    "bn_add_relu": (bn_add_relu.bn_add_relu_fwd_kernel, 8, 4096, RESIDUAL_BN, {}),
    "bn_add_bn_relu": (bn_add_relu.bn_add_relu_fwd_kernel, 8, 4096, [], {}),
    "bn_relu_backward": (
        bn_add_relu.bn_add_relu_bwd_kernel,
        8,
        2048,
        ["y", "residual", *RESIDUAL_BN[:3], "dresidual", "part_gr"],
        {},
    ),
    "bn_add_relu_backward": (
        bn_add_relu.bn_add_relu_bwd_kernel,
        8,
        2048,
        ["bias", "residual", *RESIDUAL_BN[:3], "part_gr"],
        {},
    ),
    "bn_add_bn_relu_backward": (bn_add_relu.bn_add_relu_bwd_kernel, 8, 2048, ["bias"], {}),
    "bn_reduce": (
        bn_add_relu.bn_reduce_bwd_kernel,
        4,
        0,
        [],
        {
            "BLOCK_PARTS": bn_add_relu.REDUCE_BLOCK_PARTS,
            "BLOCK_CHANNELS": bn_add_relu.REDUCE_BLOCK_CHANNELS,
        },
    ),
    "conv_stats_backward": (conv_backward.conv_stats_bwd_kernel, 8, 4096, [], {}),
    "sum_parts": (
        conv_gradients.sum_parts_kernel,
        4,
        0,
        [],
        {"BLOCK_PARTS": conv_gradients.SUM_BLOCK_PARTS, "BLOCK": conv_gradients.SUM_BLOCK},
    ),
    "max_pool2d": (max_pool2d.max_pool2d_fwd_kernel, 8, 2048, ["taps"], STEM_POOL),
    "max_pool2d_taps": (max_pool2d.max_pool2d_fwd_kernel, 8, 2048, ["output"], STEM_POOL),
    "max_pool2d_backward": (max_pool2d.max_pool2d_bwd_kernel, 8, 2048, [], STEM_POOL),
    "fold_bn": (conv.fold_bn_kernel, 4, 0, [], {"BLOCK": conv.FOLD_BLOCK}),
    "channel_stats": (channel_stats.channel_stats_fwd_kernel, 4, 2048, [], {}),
    "channel_stats_merge": (
        channel_stats.channel_stats_merge_kernel,
        4,
        0,
        [],
        {
            "FINAL": True,
            "BLOCK_TILES": channel_stats.MERGE_BLOCK_TILES,
            "BLOCK_CHANNELS": channel_stats.MERGE_BLOCK_CHANNELS,
        },
    ),
}


# Kernels of partial results see no 16-bit; float64 needs most registers in the fullest kernels.
OF_PARTIALS = {"bn_reduce", "channel_stats_merge"}
ELEMENTWISE_CASES = [(name, torch.float32) for name in ELEMENTWISE]
ELEMENTWISE_CASES += [(name, torch.bfloat16) for name in ELEMENTWISE if name not in OF_PARTIALS]
ELEMENTWISE_CASES += [
    (name, torch.float64)
    for name in ("bn_add_bn_relu", "bn_add_bn_relu_backward", *sorted(OF_PARTIALS))
]
# What differs little from one of those. Weight gradients in float64 are not ours.
ELEMENTWISE_REST = [
    pytest.param(name, dtype, marks=pytest.mark.every_configuration)
    for name, dtype in itertools.product(
        ELEMENTWISE, [torch.float16, torch.bfloat16, torch.float64]
    )
    if (name, dtype) not in ELEMENTWISE_CASES
    and not (name in OF_PARTIALS and dtype.itemsize == 2)
    and (name, dtype) != ("sum_parts", torch.float64)
]


def compile_elementwise(
    target: str,
    name: str,
    dtype: torch.dtype,
    *,
    ones: bool = False,
    wide: bool = False,
    channels: int = 64,
) -> CompiledKernel:
    """One of ELEMENTWISE, its tiles those of `channels` channels, 64 of any more; with `ones` as a
    launch does whose integers are all 1.
    """
    kernel, num_warps, elements, absent, constants = ELEMENTWISE[name]
    if kernel is bn_add_relu.bn_add_relu_bwd_kernel:
        num_warps = bn_add_relu.backward_warps(dtype)
    common = {
        "EPS": 1e-5,
        "RESIDUAL_EPS": 1e-5,
        "RELU": True,
        "ACC": triton.language.float64 if dtype == torch.float64 else triton.language.float32,
        "WIDE": wide,
    }
    if elements:
        common["BLOCK_ROWS"], common["BLOCK_CHANNELS"] = row_tile(channels, elements)
    constants = {**dict.fromkeys(absent), **common, **constants}
    if ones:
        special = [p.name for p in kernel.params if not p.do_not_specialize]
        constants |= {key: 1 for key in special if key in INTEGERS}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    of_channels = kernel is not conv.fold_bn_kernel
    activations = [key for key in ACTIVATIONS if not (key == "weight" and of_channels)]
    return compile_for(kernel, target, dtype, constants, num_warps, activations=activations)


@pytest.mark.parametrize(("name", "dtype"), [*ELEMENTWISE_CASES, *ELEMENTWISE_REST], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_elementwise(target: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_good_code(compile_elementwise(target, name, dtype), target, False, tmp_path)


@pytest.mark.every_configuration
@pytest.mark.parametrize(
    ("name", "dtype"),
    [case for case in ELEMENTWISE_CASES if "WIDE" in ELEMENTWISE[case[0]][0].arg_names],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
def test_elementwise_wide(target: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """With offsets of 64 bits."""
    compiled = compile_elementwise(target, name, dtype, wide=True)
    assert_good_code(compiled, target, False, tmp_path)


@pytest.mark.every_configuration
@pytest.mark.parametrize("channels", [16, 32])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [case for case in ELEMENTWISE_CASES if ELEMENTWISE[case[0]][2] > 0],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
def test_elementwise_of_few_channels(
    target: str, name: str, dtype: torch.dtype, channels: int, tmp_path: Path
) -> None:
    compiled = compile_elementwise(target, name, dtype, channels=channels)
    assert_good_code(compiled, target, False, tmp_path)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_of_one_pixel_and_channel(name: str) -> None:
    """Triton compiles an argument that is 1 as a constant, which not every expression takes."""
    assert compile_elementwise("sm_90", name, torch.float32, ones=True).asm["cubin"]


def test_rows_are_counted_in_32_bits_and_more_are_refused() -> None:
    assert rows_of(torch.empty(1, 3, 2**15, 2**15, device="meta")) == 2**30
    with pytest.raises(RuntimeError, match="expected fewer than"):
        rows_of(torch.empty(2, 3, 2**15, 2**15, device="meta"))
