"""Draws engine.svg: block tables, the blocks that they share, and the state as a tree.

    python docs/images/draw_engine.py

The tables are those of the block manager: three sequences fork a prompt of 6 tokens, in
blocks of 4, and each writes its own tokens. A test compares the file with the output.
"""

import pathlib
from xml.sax.saxutils import escape

import jax
import jax.numpy as jnp

from jpaged import block_manager
from jpaged.block_manager import NO_BLOCK, BlockState

FILE = pathlib.Path(__file__).with_name("engine.svg")
WIDTH, HEIGHT = 860, 352
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"  # colour-blind readers see them
GREY, LIGHT, INK = "#8C8C8C", "#F2F4F7", "#22272E"
NAMES = (("beam 0", BLUE), ("beam 1", ORANGE), ("beam 2", GREEN))
CELL, ROW = 38, 30


def example() -> BlockState:
    """Return three rows that share the full block of their prompt."""
    append, fork = jax.jit(block_manager.append), jax.jit(block_manager.fork)
    blocks = block_manager.init_state(
        num_blocks=8, block_size=4, max_seqs=3, max_blocks_per_seq=3
    )
    blocks, _ = append(blocks, jnp.array([6, 0, 0]))
    blocks = fork(blocks, jnp.array([0, 0, 0]))
    blocks, _ = append(blocks, jnp.array([1, 1, 1]))
    blocks, _ = append(blocks, jnp.array([2, 1, 0]))
    return blocks


def text(x: float, y: float, content: str, **style: object) -> str:
    """Return a text element; `size`, `fill`, `anchor` and `weight` are its style."""
    size, fill = style.get("size", 13), style.get("fill", INK)
    family = style.get("family", "Helvetica, Arial, sans-serif")
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" '
        f'text-anchor="{style.get("anchor", "start")}" '
        f'font-weight="{style.get("weight", "normal")}" font-family="{family}" '
        f'xml:space="preserve">{escape(content)}</text>'
    )


def box(x: float, y: float, width: float, height: float, **style: object) -> str:
    """Return a rectangle with `fill`, `stroke` and rounded corners of radius `r`."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        f'rx="{style.get("r", 3)}" fill="{style.get("fill", "white")}" '
        f'stroke="{style.get("stroke", "none")}" '
        f'stroke-width="{style.get("line", 1.2)}"/>'
    )


def tables(blocks: BlockState, x: float, y: float) -> list[str]:
    """Draw one line per sequence, with the numbers of its blocks."""
    parts = [text(x, y - 12, "block_tables  i32[S, M]", weight="bold")]
    for row, (name, color) in enumerate(NAMES):
        top = y + row * ROW
        tokens = int(blocks.context_lens[row])
        parts.append(text(x, top + 18, name, fill=color, weight="bold"))
        for column, block in enumerate(blocks.block_tables[row].tolist()):
            left = x + 62 + column * CELL
            is_used = block != NO_BLOCK
            stroke = color if is_used else "#D0D5DB"
            parts.append(box(left, top, CELL - 4, ROW - 6, stroke=stroke, line=1.6))
            parts.append(
                text(
                    left + (CELL - 4) / 2,
                    top + 17,
                    str(block) if is_used else "-",
                    anchor="middle",
                    fill=INK if is_used else GREY,
                )
            )
        parts.append(
            text(x + 68 + 3 * CELL, top + 17, f"{tokens} tokens", size=12, fill=GREY)
        )
    return parts


def pool(blocks: BlockState, x: float, y: float) -> list[str]:
    """Draw the blocks of the pool, with a slot per token and the owners' colours."""
    parts = [text(x, y - 12, "k_pages, v_pages  [L, N, K, P, D]", weight="bold")]
    block_tables = blocks.block_tables.tolist()
    for block, count in enumerate(blocks.ref_counts.tolist()):
        left, top = x + (block % 4) * 100, y + (block // 4) * 54
        owners = [row for row, table in enumerate(block_tables) if block in table]
        slots = 0
        if owners:
            column = block_tables[owners[0]].index(block)
            stored = int(blocks.context_lens[owners[0]]) - 4 * column
            slots = max(0, min(4, stored))
        for slot in range(4):
            fill = "#E4E7EC" if slot < slots and len(owners) > 1 else LIGHT
            if slot < slots and len(owners) == 1:
                fill = NAMES[owners[0]][1]
            parts.append(box(left + slot * 18, top, 16, 22, fill=fill, r=2))
            if slot < slots and len(owners) > 1:  # one stripe per owner
                height = 22 / len(owners)
                parts += [
                    box(left + slot * 18, top + i * height, 16, height,
                        fill=NAMES[row][1], r=0)
                    for i, row in enumerate(owners)
                ]  # fmt: skip
        label = f"{block}: {count} owners" if count > 1 else f"{block}"
        parts.append(text(left, top + 37, label, size=11, fill=GREY))
    return parts


def pytree(x: float, y: float) -> list[str]:
    """Draw the engine's state as a tree, and the functions on it."""
    fields = (
        ("├─ requests", "tokens, parameters, queue"),
        ("├─ rows", "sequence of each batch row"),
        ("├─ blocks", "block_tables, ref_counts, lengths"),
        ("├─ prefix_cache", "blocks that later prompts map"),
        ("├─ cache", "k_pages, v_pages"),
        ("└─ counters, timeline", ""),
    )
    code = {"size": 12.5, "family": "Menlo, Consolas, monospace"}
    parts = [
        box(x, y, 336, 158, fill=LIGHT, r=8),
        text(x + 14, y + 26, "EngineState", weight="bold", **code),
    ]
    for number, (name, meaning) in enumerate(fields):
        top = y + 46 + 20 * number
        parts.append(text(x + 14, top, name, **code))
        parts.append(text(x + 138, top, meaning, size=11.5, fill=GREY))
    calls = (
        ("step(params, state) -> state", "one step: schedule, decode, sample"),
        ("run = while_loop(has_work, step)", "a whole run in one program"),
        ("jax.vmap(step), jax.tree.map(copy, state)", "sweep, fork, save"),
    )
    for number, (call, meaning) in enumerate(calls):
        top = y + 186 + 38 * number
        parts.append(text(x + 2, top, call, **code))
        parts.append(text(x + 2, top + 16, meaning, size=11.5, fill=GREY))
    return parts


def draw() -> str:
    """Return the picture."""
    blocks = example()
    parts = [
        box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, fill="white", stroke="#E4E7EC", r=10),
        text(24, 32, "Sequences share blocks", size=16, weight="bold"),
        text(24, 50, "three beams of one prompt: 6 tokens, blocks of 4", size=12,
             fill=GREY),
        *tables(blocks, 24, 92),
        text(24, 196, "↓  a full block is shared, a partial block is copied when it is "
             "written", size=12, fill=GREY),
        *pool(blocks, 24, 240),
        text(500, 32, "The whole engine is one pytree", size=16, weight="bold"),
        text(500, 50, "scheduling, memory and decoding are pure functions", size=12,
             fill=GREY),
        *pytree(500, 64),
    ]  # fmt: skip
    title = "Block tables and blocks of three beams, and the engine's state as a pytree"
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" role="img" aria-label="{title}">\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    FILE.write_text(draw(), "utf-8")
