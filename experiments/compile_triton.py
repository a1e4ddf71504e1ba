"""Compiles the Triton kernels for NVIDIA GPUs, with no GPU present.

    python -m experiments.compile_triton --arch 80,90

Prints for each kernel, shape and compute capability the registers of a thread, the
bytes that are spilled, and the shared memory of a program; the last line is one JSON
object. Needs the extra `triton`; takes about a second for each. Expected: no spills.
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
from typing import Any

from absl import flags

from experiments.lib import runner
from jpaged.attention.cascade import num_members
from jpaged.triton import tiles

FLAGS = flags.FLAGS
# heads, head_dim, block_size, dtypes of q and of pages
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
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_list("arch", ["80", "90"], "Compute capabilities.")
    flags.DEFINE_list("shapes", list(SHAPES), "Which shapes.")


def programs(name: str) -> dict[str, tuple[str, dict[str, str], dict[str, Any], Any]]:
    """Kernel, pointers' types, static arguments and tiles of all calls of a shape."""
    (heads, kv_heads), head_dim, block_size, kind, page_kind = SHAPES[name]
    group, is_quantised = heads // kv_heads, ITEMSIZE[page_kind] == 1
    tile = tiles.choose(head_dim, ITEMSIZE[page_kind], ITEMSIZE[kind])
    sizes = dict(HEAD_DIM=head_dim, HAS_SINKS=False)
    inputs = dict(q_ptr=kind, k_ptr=page_kind, v_ptr=page_kind)
    inputs |= dict(k_scale_ptr="fp32", v_scale_ptr="fp32")
    numbers = ("tables", "lens", "starts", "items", "parts", "settings")
    inputs |= {f"{number}_ptr": "i32" for number in numbers}
    floats = dict(lse_ptr="fp32", part_out_ptr="fp32", part_lse_ptr="fp32")
    inputs |= {"sinks_ptr": "fp32", "out_ptr": kind, **floats}
    found = {}
    calls = {
        "decode": (1, 1),
        "prompt": (tile.query_rows // group, 1),
        "prefix": (1, num_members(heads, kv_heads, 64, tile.query_rows)),
    }
    for call, (queries, members) in calls.items():
        rows = queries * members * group
        static = dict(
            HEADS=members * heads,
            KV_HEADS=kv_heads,
            BLOCK=block_size,
            QUERIES=queries,
            ROWS=max(1 << (rows - 1).bit_length(), 16),
            TOKENS=tile.tokens,
            SCALE=head_dim**-0.5,
            SOFT_CAP=0.0,
            SCALES=block_size if is_quantised else 0,
            PRECISION="ieee" if kind == "fp32" else "tf32",
        )
        warps = tile.num_warps * (1 if call == "decode" else 2)
        tile_ = dataclasses.replace(tile, num_warps=warps)
        found[call] = "attend", inputs, sizes | static, tile_
    partial = dict(part_out_ptr="fp32", part_lse_ptr="fp32", starts_ptr="i32")
    partial |= dict(parts_ptr="i32", sinks_ptr="fp32", out_in=kind, lse_in="fp32")
    partial |= dict(out_ptr=kind, lse_ptr="fp32")
    found["merge"] = "merge", partial, sizes | dict(HEADS=heads), tiles.Tiles()
    return found | page_updates(name)


def page_updates(name: str) -> dict[str, tuple[str, dict[str, str], dict, Any]]:
    """The same of `write` and `copy`."""
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
    return {
        "write": (f"write{ending}", new | pools, static, tiles.Tiles()),
        "copy": (f"copy{ending}", pairs, sizes, tiles.Tiles()),
    }


def compile_one(kernel: str, pointers, static, tile, arch: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, and what the program's text shows."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget
    function = getattr(importlib.import_module("jpaged.triton.kernels"), kernel)
    names = function.arg_names
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= dict.fromkeys(static, "constexpr")
    # jax's arrays begin at multiples of 16 bytes, as jax-triton tells the compiler.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = compiler.ASTSource(
        fn=function,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in static.items()},
        attrs=aligned,
    )
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    options["enable_fp_fusion"] = True  # as jax-triton
    program = triton.compile(source, target=target("cuda", arch, 32), options=options)
    text = program.asm["ptx"]
    usage = _usage(program.asm["cubin"])
    copies = len(re.findall(r"cp\.async\.c[ag]", text))
    return dict(shared_bytes=program.metadata.shared, async_copies=copies, **usage)


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory, which are spills, by cuobjdump."""
    triton = importlib.import_module("triton")
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    registers = re.search(r"REG:(\d+)", text)
    stack, local = re.search(r"STACK:(\d+)", text), re.search(r"LOCAL:(\d+)", text)
    if registers is None or stack is None or local is None:
        raise RuntimeError(f"cuobjdump: expected registers, got {text}")
    spilled = int(stack[1]) + int(local[1])
    return dict(registers=int(registers[1]), spilled_bytes=spilled)


def main(_: list[str]) -> None:
    """Reads the flags, prints a table, and one JSON object as the last line."""
    if importlib.util.find_spec("triton") is None:
        sys.exit("compile_triton: needs triton; run: pip install 'jpaged[triton]'")
    rows = []
    print(f"{'shape':<18}{'call':<8}{'sm':>4}{'regs':>6}{'spilled':>9}{'shared':>9}")
    for name in FLAGS.shapes:
        for call, program in programs(name).items():
            for arch in map(int, FLAGS.arch):
                row = dict(shape=name, call=call, arch=arch)
                row |= compile_one(*program, arch)
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
