"""Compiles the Triton kernels for NVIDIA GPUs, without a GPU.

    python -m experiments.compile_triton --arch 80,90

Prints the registers per thread, the spilled bytes per thread and the shared memory per
program, for each kernel, shape and compute capability. The last line is a JSON object.
Needs Triton (extra `gpu-compile` or `triton`). A kernel takes about a second. Expected:
no program spills more than 16 bytes.
"""

import dataclasses
import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from absl import flags

from experiments.lib import runner
from jpaged.attention.cascade import num_members
from jpaged.triton.tiles import TritonTiles, default_tiles

FLAGS = flags.FLAGS
# heads, head_dim, block_size, dtype of q, dtype of pages
SHAPES = {
    "llama_3_8b": ((32, 8), 128, 16, "bf16", "bf16"),
    "qwen_2_5_7b": ((28, 4), 128, 64, "fp16", "fp16"),
    "llama_3_2_1b": ((32, 8), 64, 16, "bf16", "bf16"),
    "gemma_2_2b": ((8, 4), 256, 16, "bf16", "bf16"),
    "one_key_float32": ((16, 1), 64, 128, "fp32", "fp32"),
    "llama_3_8b_int8": ((32, 8), 128, 16, "bf16", "i8"),
    "llama_3_8b_fp8": ((32, 8), 128, 16, "bf16", "u8"),
    "llama_3_2_1b_int8": ((32, 8), 64, 16, "bf16", "i8"),
    "llama_3_2_1b_fp8": ((32, 8), 64, 16, "bf16", "u8"),
    "gemma_2_2b_int8": ((8, 4), 256, 16, "bf16", "i8"),
    "gemma_2_2b_fp8": ((8, 4), 256, 16, "bf16", "u8"),
    "qwen_2_5_7b_int8": ((28, 4), 128, 64, "fp16", "i8"),
    "qwen_2_5_7b_fp8": ((28, 4), 128, 64, "fp16", "u8"),
    "float32_int8": ((32, 8), 128, 16, "fp32", "i8"),
    "float32_fp8": ((32, 8), 64, 16, "fp32", "u8"),
}
ITEMSIZE = {"i8": 1, "u8": 1, "bf16": 2, "fp16": 2, "fp32": 4}


def define_flags() -> None:
    """Define the flags; only the runner's own process has them."""
    flags.DEFINE_list("arch", ["80", "90"], "Compute capabilities to compile for.")
    flags.DEFINE_list("shapes", list(SHAPES), "Names of the shapes to compile.")


class Program(NamedTuple):
    """A kernel with everything that determines its compiled program."""

    kernel: str
    pointers: dict[str, str]  # the types that pointers point to
    static: dict[str, Any]
    tiles: TritonTiles


def programs(name: str) -> dict[str, Program]:
    """Return the programs of a shape, by the call that launches them."""
    (heads, _), head_dim, _, kind, _ = SHAPES[name]
    partial = dict(part_out_ptr="fp32", part_lse_ptr="fp32", starts_ptr="i32")
    partial |= dict(parts_ptr="i32", sinks_ptr="fp32", out_in=kind, lse_in="fp32")
    partial |= dict(out_ptr=kind, lse_ptr="fp32")
    static = dict(HEAD_DIM=head_dim, HAS_SINKS=False, HEADS=heads)
    merge = Program("merge_kernel", partial, static, TritonTiles())
    return attention_programs(name) | {"merge": merge} | page_update_programs(name)


def attention_programs(name: str) -> dict[str, Program]:
    """Return the programs of attention: decode, prompts, and shared prefixes."""
    (heads, kv_heads), head_dim, block_size, kind, page_kind = SHAPES[name]
    group = heads // kv_heads
    tiles = default_tiles(head_dim, ITEMSIZE[page_kind], ITEMSIZE[kind])
    pointers = dict(q_ptr=kind, k_ptr=page_kind, v_ptr=page_kind, out_ptr=kind)
    integers = ("tables", "lens", "starts", "items", "parts", "settings")
    floats = ("k_scale", "v_scale", "sinks", "lse", "part_out", "part_lse")
    pointers |= {f"{one}_ptr": "i32" for one in integers}
    pointers |= {f"{one}_ptr": "fp32" for one in floats}
    # Queries per tile, and rows that a virtual row of a shared prefix stands for.
    calls = {
        "decode": (1, 1),
        "prompt": (tiles.query_rows // group, 1),
        "prefix": (1, num_members(heads, kv_heads, 64, tiles.query_rows)),
    }
    found = {}
    for call, (queries, members) in calls.items():
        static = dict(
            HEADS=members * heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK=block_size,
            QUERIES=queries,
            ROWS=max(1 << (queries * members * group - 1).bit_length(), 16),
            TOKENS=tiles.tokens,
            SCALE=head_dim**-0.5,
            SOFT_CAP=0.0,
            HAS_SINKS=False,
            SCALES=block_size if ITEMSIZE[page_kind] == 1 else 0,
            PRECISION="ieee" if kind == "fp32" else "tf32",
        )
        num_warps = tiles.num_warps * (1 if call == "decode" else 2)
        sizes = dataclasses.replace(tiles, num_warps=num_warps)
        found[call] = Program("attend_kernel", pointers, static, sizes)
    return found


def page_update_programs(name: str) -> dict[str, Program]:
    """Return the programs that write tokens and copy blocks."""
    (_, kv_heads), head_dim, block_size, _, kind = SHAPES[name]
    size, is_quantised = kv_heads * head_dim, ITEMSIZE[kind] == 1
    ending = "_quantised" if is_quantised else ""
    pools = dict.fromkeys(("k_in", "v_in", "k_pages_ptr", "v_pages_ptr"), kind)
    new = dict(k_ptr=kind, v_ptr=kind, slots_ptr="i32", settings_ptr="i32")
    if is_quantised:
        names = ("k_scales_in", "v_scales_in", "k_scales_ptr", "v_scales_ptr")
        pools |= dict.fromkeys(names, "fp32")
        new |= dict(k_scale_ptr="fp32", v_scale_ptr="fp32")
    static = dict(KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK=block_size)
    static |= dict(STRIDE=block_size, SIZE=1 << (size - 1).bit_length())
    pairs = dict(src_ptr="i32", dst_ptr="i32", settings_ptr="i32") | pools
    sizes = dict(BLOCK_SIZE=size * block_size, SIZE=4096)
    if is_quantised:
        sizes["SCALES"] = kv_heads * block_size
    kernels = f"write{ending}_kernel", f"copy{ending}_kernel"
    return {
        "write": Program(kernels[0], new | pools, static, TritonTiles()),
        "copy": Program(kernels[1], pairs, sizes, TritonTiles()),
    }


def compile_program(program: Program, arch: int) -> dict[str, Any]:
    """Compile for a compute capability; return what the compiled program uses."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget
    kernels = importlib.import_module("jpaged.triton.kernels")
    function = getattr(kernels, program.kernel)
    names = function.arg_names
    signature = {name: f"*{kind}" for name, kind in program.pointers.items()}
    signature |= dict.fromkeys(program.static, "constexpr")
    # jax aligns arrays to 16 bytes, which jax-triton tells the compiler.
    aligned = [["tt.divisibility", 16]]
    source = compiler.ASTSource(
        fn=function,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(k),): value for k, value in program.static.items()},
        attrs={(names.index(name),): aligned for name in program.pointers},
    )
    tiles = program.tiles
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    options["enable_fp_fusion"] = True  # as jax-triton
    compiled = triton.compile(source, target=target("cuda", arch, 32), options=options)
    copies = len(re.findall(r"cp\.async\.c[ag]", compiled.asm["ptx"]))
    shared = dict(shared_bytes=compiled.metadata.shared, async_copies=copies)
    return shared | _registers(compiled.asm["cubin"])


def _registers(cubin: bytes) -> dict[str, int]:
    """Return the registers per thread, and its local memory, which holds spills."""
    package = importlib.util.find_spec("triton")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("triton: expected an installed package, got none")
    tool = pathlib.Path(package.origin).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    registers = re.search(r"REG:(\d+)", text)
    stack, local = re.search(r"STACK:(\d+)", text), re.search(r"LOCAL:(\d+)", text)
    if registers is None or stack is None or local is None:
        raise RuntimeError(f"cuobjdump: expected a count of registers, got {text!r}")
    spilled = int(stack[1]) + int(local[1])
    return dict(registers=int(registers[1]), spilled_bytes=spilled)


def main(_: list[str]) -> None:
    """Read the flags, compile, and print a table and a JSON object."""
    if importlib.util.find_spec("triton") is None:
        sys.exit(
            "compile_triton: expected triton to be installed; run: pip install "
            "'jpaged[gpu-compile]'"
        )
    rows = []
    print(f"{'shape':<18}{'call':<8}{'sm':>4}{'regs':>6}{'spilled':>9}{'shared':>9}")
    for name in FLAGS.shapes:
        for call, program in programs(name).items():
            for arch in map(int, FLAGS.arch):
                row = dict(shape=name, call=call, arch=arch)
                row |= compile_program(program, arch)
                rows.append(row)
                print(
                    f"{name:<18}{call:<8}{arch:>4}{row['registers']:>6}"
                    f"{row['spilled_bytes']:>9}{row['shared_bytes']:>9}",
                    flush=True,
                )
    version = importlib.import_module("triton").__version__
    print(json.dumps(dict(triton=version, rows=rows)))


if __name__ == "__main__":
    runner.start(main, define_flags)
