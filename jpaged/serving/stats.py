"""Statistics: the dicts that `LLM.stats` and `LLM.replica_stats` return.

Pipeline: engine host, batcher -> [stats] -> llm. Host only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jpaged.attention import backends
from jpaged.config import EngineConfig
from jpaged.kv import cache_groups
from jpaged.models.config import ModelConfig
from jpaged.serving.batcher import Batcher
from jpaged.serving.engine_host import EngineHost

Stats = dict[str, Any]  # numbers, and the name of the attention backend


def attention_name(config: EngineConfig) -> str:
    """Return the name of the backend whose kernels serve."""
    return backends.serving_name(config.attention)


def group_windows(model: ModelConfig, config: EngineConfig) -> str:
    """Return the windows of the cache groups for `repr`; empty without windows."""
    if not cache_groups.has_windows(model.windows):
        return ""
    windows: Any = config.group_windows
    return f"group_windows={windows if cache_groups.has_windows(windows) else 'off'}, "


def llm_stats(
    host: EngineHost, batcher: Batcher, block_bytes: int, num_prompt_tokens: int
) -> Stats:
    """Return the statistics of an LLM, summed over replicas; see `LLM.stats`.

    Args:
      host: the engine.
      batcher: its open requests.
      block_bytes: bytes of one KV block.
      num_prompt_tokens: prompt tokens of all requests so far.
    """
    with host.lock:
        batcher.end_aborted()
        num_free_blocks, num_cached_blocks = host.count_blocks()
        num_running = host.num_running()
    num_blocks = host.config.num_blocks * host.num_replicas
    return {
        "attention": attention_name(host.config),
        "num_replicas": host.num_replicas,
        "num_blocks": num_blocks,
        "block_size": host.config.block_size,
        "kv_bytes": block_bytes * num_blocks,
        "num_cache_groups": len(host.config.group_windows),
        "max_used_kv_bytes": block_bytes * host.counters["max_used_blocks"],
        "kv_bytes_single_table": block_bytes * _single_table_blocks(host.counters),
        "num_free_blocks": int(num_free_blocks.sum()),
        "num_cached_blocks": int(num_cached_blocks.sum()),
        **_engine_stats(host.counters),
        "num_compilations": host.runner.compiled.num_compilations,
        "compile_s": host.runner.compile_s,
        "run_s": host.runner.run_s,
        "prompt_tokens": num_prompt_tokens,
        "generated_tokens": batcher.num_generated,
        "tokens_per_s": host.tokens_per_s,
        "num_finished_requests": batcher.latencies.num_requests,
        **batcher.latencies.means(),
        "num_lost_events": host.runner.log.num_lost_events,
        "num_running": num_running,
    }


def replica_stats(host: EngineHost, batcher: Batcher) -> list[Stats]:
    """Return the statistics of each replica's engine; see `LLM.replica_stats`."""
    with host.lock:
        batcher.end_aborted()
        num_free_blocks, num_cached_blocks = host.count_blocks()
    return [
        {
            "num_blocks": host.config.num_blocks,
            "num_free_blocks": int(num_free_blocks[replica]),
            "num_cached_blocks": int(num_cached_blocks[replica]),
            **_engine_stats(
                {n: c[replica].item() for n, c in host.replica_counters.items()}
            ),
        }
        for replica in range(host.num_replicas)
    ]


def _single_table_blocks(counters: Mapping[str, Any]) -> int:
    """Return the blocks that one table for all layers would have used."""
    return counters.get("single_table_blocks", counters["max_used_blocks"])


def _engine_stats(counters: Mapping[str, Any]) -> Stats:
    """Return the statistics that follow from an engine's counters, or from sums."""
    num_steps = max(counters["num_steps"], 1)
    return {
        "max_used_blocks": counters["max_used_blocks"],
        "kv_token_share": counters["token_share"] / num_steps,
        "blocks_saved_by_sharing": counters["saved_share"] / num_steps,
        "prefix_hit_ratio": counters["num_cached_tokens"]
        / max(counters["num_prompt_tokens"], 1),
        "num_block_copies": counters["num_block_copies"],
        "num_preemptions": counters["num_preemptions"],
        "num_swapped_blocks": counters["num_swapped_blocks"],
        "num_dropped_tokens": counters.get("num_dropped_tokens", 0),
        "draft_tokens": counters["num_drafts"],
        "accepted_tokens": counters["num_accepted"],
        "acceptance_rate": counters["num_accepted"] / max(counters["num_drafts"], 1),
        "num_steps": counters["num_steps"],
        "computed_tokens": counters["num_tokens"],
    }
