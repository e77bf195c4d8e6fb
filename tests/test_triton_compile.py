"""Triton's kernels compiled for GPUs that need not be there, and what the machine code must hold:
no register spills, tensor cores where there is a dot, shared memory within the chip's limit.
"""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fastres.kernels._launch import row_tile

add_relu = importlib.import_module("fastres.kernels.add_relu")
bn_add_relu = importlib.import_module("fastres.kernels.bn_add_relu")
channel_stats = importlib.import_module("fastres.kernels.channel_stats")
conv = importlib.import_module("fastres.kernels.conv")
conv_backward = importlib.import_module("fastres.kernels.conv_backward")

SHARED_MEMORY = {80: 166912, 90: 232448}
TENSOR_CORE = {80: r"\bHMMA\.", 90: r"\bHGMMA\."}
POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
# Arguments that are neither tensors of the activations' dtype nor compile-time constants.
INTEGERS = ["rows", "tiles", "parts", "channels", "numel", "tile_rows", "part_rows", "group"]
INTEGERS += ["height", "width", "in_channels", "out_height", "out_width", "out_channels"]
ACTIVATIONS = ["input", "weight", "residual", "output", "dy", "y", "z", "dz", "dresidual", "dinput"]


def compile_for(
    kernel: triton.JITFunction,
    architecture: int,
    dtype: torch.dtype,
    constants: dict[str, object],
    num_warps: int,
    num_stages: int = 3,
    activations: list[str] = ACTIVATIONS,
) -> CompiledKernel:
    """Compile as a launch with 16-byte aligned tensors and channels in sixteens would."""
    vectors = POINTER[torch.float64 if dtype == torch.float64 else torch.float32]
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        assert not name.isupper(), f"{name} has no value"
        if name in INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = POINTER[dtype] if name in activations else vectors
        if name.endswith("channels") or name not in INTEGERS:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return triton.compile(source, GPUTarget("cuda", architecture, 32), options)


def assert_good_code(
    compiled: CompiledKernel, architecture: int, tensor_cores: bool, folder: Path
) -> None:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\bEXIT\b", sass), "no machine code"
    spills = re.findall(r"\b(?:STL|LDL)\b", sass)
    assert not spills, f"{len(spills)} register spills"
    assert bool(re.search(TENSOR_CORE[architecture], sass)) == tensor_cores
    assert compiled.metadata.shared <= SHARED_MEMORY[architecture]


EPILOGUE = ["running_mean", "running_var", "bias", "bn_weight", "bn_bias", "residual"]
PROLOGUE = ["in_mean", "in_var", "in_weight", "in_bias"]
PARTIALS = ["part_mean", "part_m2"]
ABSENT = {
    "inference": PROLOGUE + PARTIALS,
    "training": PROLOGUE + EPILOGUE,
    "training with prologue": EPILOGUE,
}


def conv_cases() -> list[tuple[object, ...]]:
    cases = []
    for architecture in SHARED_MEMORY:
        for tile in conv.CONV_TILES:
            for mode in ABSENT:
                prologue = mode == "training with prologue"

                def ships(dtype: torch.dtype, a=architecture, t=tile, p=prologue) -> bool:
                    return conv.tile_fits(t, dtype, p, divmod(a, 10))

                row = (architecture, tile, mode)
                if ships(torch.bfloat16):
                    cases.append((*row, torch.bfloat16, "3x3"))
                if ships(torch.float32):
                    cases.append((*row, torch.float32, "3x3"))
            # What differs little is compiled once a tile, in its fullest mode.
            if conv.tile_fits(tile, torch.float16, False, divmod(architecture, 10)):
                cases.append((architecture, tile, "inference", torch.float16, "1x1"))
                cases.append((architecture, tile, "inference", torch.bfloat16, "wide offsets"))
            if conv.tile_fits(tile, torch.bfloat16, True, divmod(architecture, 10)):
                row = (architecture, tile, "training with prologue", torch.bfloat16)
                cases.append((*row, "ragged depth"))
    return cases


@pytest.mark.parametrize(
    ("architecture", "tile", "mode", "dtype", "shape"), conv_cases(), ids=lambda value: str(value)
)
def test_convolution(
    architecture: int, tile: str, mode: str, dtype: torch.dtype, shape: str, tmp_path: Path
) -> None:
    config = conv.CONV_TILES[tile]
    kernel_size = 1 if shape == "1x1" else 3
    constants = {
        **dict.fromkeys(ABSENT[mode]),
        "KERNEL_H": kernel_size,
        "KERNEL_W": kernel_size,
        "STRIDE_H": 1,
        "STRIDE_W": 1,
        "PADDING_H": kernel_size // 2,
        "PADDING_W": kernel_size // 2,
        "IN_EPS": 1e-5,
        "EPS": 1e-5,
        "RELU": mode == "inference",
        "EVEN_DEPTH": shape != "ragged depth",
        "WIDE": shape == "wide offsets",
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_DEPTH": config.block_depth(dtype),
        "GROUP_ROWS": conv.GROUP_ROWS,
    }
    compiled = compile_for(
        conv.conv_fwd_kernel,
        architecture,
        dtype,
        constants,
        config.num_warps,
        config.num_stages,
        ["input", "weight", "output", "residual"],
    )
    assert_good_code(compiled, architecture, True, tmp_path)


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


@pytest.mark.parametrize(("name", "dtype"), ELEMENTWISE_CASES, ids=str)
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_elementwise(architecture: int, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kernel, num_warps, elements, absent, constants = ELEMENTWISE[name]
    if kernel is bn_add_relu.bn_add_relu_bwd_kernel:
        num_warps = bn_add_relu.backward_warps(dtype)
    common = {
        "EPS": 1e-5,
        "RESIDUAL_EPS": 1e-5,
        "RELU": True,
        "ACC": triton.language.float64 if dtype == torch.float64 else triton.language.float32,
        "WIDE": False,
    }
    if elements:
        common["BLOCK_ROWS"], common["BLOCK_CHANNELS"] = row_tile(256, elements)
    constants = {**dict.fromkeys(absent), **common, **constants}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    activations = [key for key in ACTIVATIONS if key != "weight"]
    compiled = compile_for(
        kernel, architecture, dtype, constants, num_warps, activations=activations
    )
    assert_good_code(compiled, architecture, False, tmp_path)
