"""The tables of docs/life_of_a_request.md equal what the engine does.

The engine's own step runs, with a table of letters in place of the decoder and the
sampler. `python -m tests.docs.life_of_a_request_test` prints the tables in the form of
the page.
"""

import dataclasses
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, scheduler
from jpaged.config import EngineConfig
from jpaged.engine import bookkeeping, forward, iteration, request_table, sampling
from jpaged.engine import state as engine_state
from jpaged.engine.request_table import SampledTokens
from jpaged.kv import block_manager
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.params import SamplingParams
from jpaged.scheduler import NO_REQUEST, WAITING

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "life_of_a_request.md"

# Name, prompt, and the generated text of each sample: a letter is a token.
REQUESTS = (
    ("A", "Four_score_", ["and_s"]),
    ("B", "To_", ["be_or_"]),
    ("C", "All_th", ["at_is", "e_wor"]),
    ("D", "Call_me_", ["Ish"]),
)
SAMPLES = [
    (f"{name}.{number}" if len(texts) > 1 else name, prompt + text)
    for name, prompt, texts in REQUESTS
    for number, text in enumerate(texts)
]
CONFIG = EngineConfig(
    num_blocks=11,
    block_size=4,
    max_num_seqs=5,
    max_model_len=16,
    max_num_batched_tokens=12,
    max_num_requests=5,
)
HEADS = (
    *("row", "sequence", "tokens", "positions", "slot_mapping"),
    *("block_table", "context_len", "gets"),
)


# The fields of a model's config that `engine.init` reads.
SHAPE = types.SimpleNamespace(
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    dtype="int8",
    latent=None,
    windows=(None,),
)


def start() -> engine.EngineState:
    """Submit the four requests to a new engine."""
    state = engine.init(types.SimpleNamespace(config=SHAPE), CONFIG)
    prompts = [list(map(ord, prompt)) for _, prompt, _ in REQUESTS]
    params = [
        SamplingParams(n=len(texts), max_tokens=len(texts[0]))
        for _, _, texts in REQUESTS
    ]
    state, seq_indices = engine.submit(state, prompts, params)
    assert [seq_index for mine in seq_indices for seq_index in mine] == list(
        range(len(SAMPLES))
    )
    return state


class Recorder:
    """Replaces decoder and sampler: records a step's inputs, and returns letters."""

    def hidden_states(self, model, cache, table, blocks, batch, hidden, config):
        """Record the inputs of `forward.hidden_states`, at the step's exact size."""
        num_rows = int((batch.num_tokens > 0).sum())
        num_tokens = int(batch.num_tokens.sum())
        self.table, self.blocks = table, blocks
        self.rows = np.asarray(batch.rows[:num_rows])
        self.is_decode = num_rows == num_tokens
        make = forward._decode_inputs if self.is_decode else forward._ragged_inputs
        size = num_rows if self.is_decode else num_tokens
        self.inputs = make(table.tokens, blocks, batch, size)
        self.starts = [0, *np.cumsum(batch.num_tokens[:num_rows]).tolist()]
        return cache, hidden, blocks

    def sample_tokens(self, table, entries, logits, config, size=None):
        """Return the next letter of each row whose known tokens are all computed."""
        seq_indices = np.asarray(entries.seq_indices)
        letters = [
            ord(SAMPLES[seq_index][1][int(table.queue.num_tokens[seq_index])])
            if seq_index < len(SAMPLES)
            else 0
            for seq_index in seq_indices
        ]
        row_of = {
            int(seq_index): row for row, seq_index in enumerate(self.scheduled_rows)
        }
        self.letters = {
            row_of[int(seq_index)]: chr(letter)
            for seq_index, letter in zip(seq_indices, letters, strict=True)
            if letter
        }
        new = SampledTokens.zeros(jnp.asarray(seq_indices), 0)
        return dataclasses.replace(new, tokens=jnp.asarray(letters, jnp.int32))


def span(numbers) -> str:
    """Format numbers: 4 5 6 7 0 1 2 -> "4-7 0-2"."""
    runs = []
    for number in map(int, numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def names(mask) -> str:
    """Names of the marked sequences."""
    return (
        ", ".join(SAMPLES[seq_index][0] for seq_index in np.flatnonzero(mask)) or "none"
    )


def describe(recorder: Recorder, before, after, copies) -> str:
    """Format a step as on the page."""
    inputs, lines = recorder.inputs, [HEADS]
    sequences = recorder.scheduled_rows
    for i, row in enumerate(recorder.rows.tolist()):
        mine = slice(recorder.starts[i], recorder.starts[i + 1])
        table = np.asarray(inputs.block_tables[i])
        lines.append(
            (
                str(row),
                SAMPLES[int(sequences[row])][0],
                "".join(map(chr, np.asarray(inputs.tokens[mine]))),
                span(inputs.positions[mine]),
                span(inputs.slot_mapping[mine]),
                " ".join(map(str, table[table != NO_BLOCK])),
                str(int(inputs.context_lens[i])),
                recorder.letters.get(row, ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    counts = np.asarray(recorder.blocks.ref_counts)
    text.append("")
    if not recorder.is_decode:
        starts = " ".join(map(str, recorder.starts))
        text.append(f"query_start_loc  {starts}")
    text.append(f"ref_counts       {' '.join(map(str, counts))}")
    for src, dst in copies:
        text.append(f"copied first     block {src} -> block {dst}")
    preempted = np.asarray(after.requests.queue.num_preemptions) > np.asarray(
        before.num_preemptions
    )
    if preempted.any():
        text.append(f"preempted        {names(preempted)}")
    waiting = np.asarray(after.requests.queue.status) == WAITING
    if waiting.any():
        text.append(f"waiting          {names(waiting)}")
    finished = set(sequences[sequences != NO_REQUEST]) - set(np.asarray(after.rows))
    ended = np.isin(np.arange(len(SAMPLES)), list(finished))
    if ended.any():
        free = int(block_manager.num_free_blocks(after.blocks))
        text.append(f"ended            {names(ended)}; {free} blocks are free now")
    return "\n".join(line.rstrip() for line in text) + "\n"


NO_MEMORY = iteration.WorkingMemory(jnp.zeros((0, 0)), jnp.zeros((0, 0)))


def walk(patch: pytest.MonkeyPatch) -> list[str]:
    """Format all steps of the run as on the page."""
    recorder = Recorder()
    patch.setattr(forward, "hidden_states", recorder.hidden_states)
    patch.setattr(sampling, "sample_tokens", recorder.sample_tokens)
    patch.setattr(sampling, "next_logits", lambda *arguments: jnp.zeros((1, 1)))
    # The step itself is not compiled, so that every value can be read.
    schedule = jax.jit(scheduler.schedule, static_argnums=3)
    append = jax.jit(block_manager.append)
    copies = []

    def recorded_schedule(*arguments):
        result = schedule(*arguments)
        recorder.scheduled_rows = np.asarray(result[1])
        return result

    def recorded_append(*arguments):
        blocks, appended = append(*arguments)
        pairs = np.stack([appended.copy_src, appended.copy_dst], axis=1)
        copies[:] = pairs[pairs[:, 0] != NO_BLOCK].tolist()
        return blocks, appended

    patch.setattr(scheduler, "schedule", recorded_schedule)
    patch.setattr(block_manager, "append", recorded_append)
    patch.setattr(block_manager, "fork", jax.jit(block_manager.fork))
    patch.setattr(request_table, "extend", jax.jit(request_table.extend))
    patch.setattr(engine_state, "count", jax.jit(engine_state.count))
    for module in (bookkeeping, iteration):
        patch.setattr(
            module, "when", lambda holds, f, carry: f(carry) if holds else carry
        )
    state = start()
    steps = []
    while engine.has_work(state):
        before = state.requests.queue
        state, _ = iteration.iterate(None, state, NO_MEMORY, CONFIG)
        assert block_manager.violations(state.blocks) == []
        steps.append(describe(recorder, before, state, copies))
    for result, (_, text) in zip(engine.collect(state), SAMPLES, strict=True):
        tokens = result.prompt_token_ids + result.token_ids
        assert "".join(map(chr, tokens)) == text
    return steps


def test_the_tables_of_the_page_equal_what_the_engine_does(monkeypatch):
    shown = re.findall(
        r"^```text step\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S
    )
    assert shown == walk(monkeypatch)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        for number, step in enumerate(walk(patch)):
            print(f"step {number}\n{step}")
