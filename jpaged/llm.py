"""LLM: the host shell. Prompts in, text out; the clock, progress and statistics.

Place on the road: user -> [llm] -> engine -> [llm] -> user. Names and meanings are
vLLM's where it has them. Everything that happens per token happens in `engine`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import (
    AsyncGenerator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, Literal

from tqdm import tqdm

from jpaged import compilation_cache
from jpaged.config import EngineConfig
from jpaged.engine import limits
from jpaged.engine.limits import Params
from jpaged.models import scoring
from jpaged.models.decoder import Decoder
from jpaged.models.scoring import Perplexity, Score
from jpaged.outputs import RequestOutput
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.policies import Policy
from jpaged.serving import intake, memory, metrics, options
from jpaged.serving.batcher import Batch
from jpaged.serving.engine_host import EngineHost
from jpaged.serving.jobs import Delta as Delta
from jpaged.serving.jobs import Job, News
from jpaged.serving.live import Request
from jpaged.serving.metrics import StepRecord
from jpaged.serving.prefix import Prefix
from jpaged.text import chat as conversations
from jpaged.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


# What the engine keeps of its last steps between two looks of the host.
NUM_RECORDED_EVENTS = 4096
NUM_RECORDED_STEPS = 1024


class LLM:
    """A language model that writes: weights, tokenizer, KV pool and engine.

    Args:
      model: folder in Hugging Face layout; a hub id ("org/name" or "hf://org/name");
        the name of a bundled model; "random:" and the name of a shape, see
        `models.shapes`; or a Decoder.
      dtype: "float32", "bfloat16", "float16"; "auto" is the checkpoint's, and float32
        on a CPU.
      kv_dtype: of keys and values in the pool; "auto" is the model's. "int8" and "fp8"
        hold them in 8 bits, with a float32 scale for each token and head.
      block_size: tokens per KV block.
      num_blocks: blocks of the pool, of each replica's where there are several. None
        takes what `max_num_seqs` sequences of `max_model_len` tokens can fill, as far
        as it fits into `memory_fraction` of the device's free memory; on a CPU also at
        most 1 GiB, or the model's own size where that is more.
      memory_fraction: see `num_blocks`.
      max_num_seqs: sequences that run at the same time, in each replica; others wait.
      max_model_len: tokens of prompt and output together. None is the model's
        longest, as far as one such sequence fits into the pool.
      max_num_batched_tokens: tokens of one step, prompt chunks and decode together.
      enable_prefix_caching: keep the blocks of ended requests while there is room, for
        prompts that begin alike; they are mapped and not computed again. After a
        change of the model's weights call `reset_prefix_cache`.
      preemption: when blocks run out, the latest requests give theirs back:
        "recompute" computes them again later; "swap" copies them to the host's memory
        and back, as far as there is room, and admits nobody meanwhile.
      num_swap_blocks: blocks in the host's memory, with preemption="swap".
      policy: which waiting request is admitted first: "fcfs"; "priority": smaller
        `SamplingParams.priority` first; "shortest_prompt"; "longest_prefix": most of
        its prompt cached; or a function, see `jpaged.policies`.
      attention: implementation of paged attention; None is the backend's best.
      cascade: samples, beams and prompts with the same beginning read its keys and
        values together, where that pays.
      mesh: of `jpaged.make_mesh`: the devices that share the model and the pages, by
        the rules of `jpaged.parallel`; None is one device. Each replica over `data` has
        a pool, a request table and a schedule of its own, as large as said here; who
        gets a request, `jpaged.routing` says. Where the devices are those of several
        processes, each makes the same LLM and the same calls, in one order, and gets
        all outputs (docs/hosts.md).
      seed: requests without a seed draw from this one and their number.
      speculative_config: guess tokens ahead, which changes no token, only how many come
        in a step. {"method": "ngram", "num_speculative_tokens": 4} takes guesses from
        the text so far, after its last `prompt_lookup_max` (3) to `prompt_lookup_min`
        (1) tokens; {"model": ...} names a smaller model of the same vocabulary.
      tokenizer: where `model` is a Decoder: a folder with tokenizer.json, or a
        Tokenizer. None is the model folder's.
      max_num_requests: places in the request table, waiting and running; where None,
        four times `max_num_seqs` and `max_num_prefixes` together, fewer where they are
        large. Calls may have any number of prompts.
      max_num_stop_ids: stop tokens of one request, EOS included.
      quantization: "int8" holds the weights of the layers' products in 8 bits.
      max_logprobs: largest `SamplingParams.logprobs` and `prompt_logprobs`.
      max_num_prefixes: prefixes that can be pinned at the same time, see `pin`.
      max_prompt_chunk: tokens of one prompt in one step, at most; None has no limit but
        max_num_batched_tokens.
      watermark: share of the blocks that admission leaves free while others run.
      check_invariants: count the engine's state anew after every step, on the host, and
        raise RuntimeError where it is unsound. For debugging: milliseconds per step.

    A call that asks for something that no call before it did (beams, logits rules, more
    log-probabilities, another algorithm) compiles the engine again; `num_compilations`
    of `stats` counts. Afterwards all calls share that program.

    Compiled programs are kept in a cache folder of the user, see
    `jpaged.compilation_cache`. Not for several threads at once.

    Raises:
      ValueError: an argument that is wrong, or asks for what is not built yet.
      FileNotFoundError: no such folder, or no checkpoint in it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Decoder,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        memory_fraction: float = 0.9,
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        max_num_batched_tokens: int = 512,
        enable_prefix_caching: bool = True,
        preemption: str = "recompute",
        num_swap_blocks: int = 0,
        policy: str | Policy = "fcfs",
        policy_parameters: Sequence[float] = (),
        attention: str | None = None,
        mesh: Any = None,
        seed: int = 0,
        speculative_config: Mapping[str, Any] | None = None,
        *,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        max_num_requests: int | None = None,
        max_num_stop_ids: int = 8,
        max_logprobs: int = 20,
        max_num_prefixes: int = 8,
        max_prompt_chunk: int | None = None,
        watermark: float = 0.01,
        check_invariants: bool = False,
        quantization: str | None = None,
        cascade: bool = False,
    ):
        arguments = dict(locals())
        options.check_sizes(
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            seed=seed,
        )
        options.check_choices(
            kv_dtype=kv_dtype,
            enable_prefix_caching=enable_prefix_caching,
            preemption=preemption,
            num_swap_blocks=num_swap_blocks,
            attention=attention,
            cascade=cascade,
            mesh=mesh,
            memory_fraction=memory_fraction,
        )
        options.check_alike(arguments)
        compilation_cache.turn_on()
        self.model, self.tokenizer, self._name = options.load(
            model, dtype, tokenizer, quantization, mesh
        )
        self.seed = seed
        self.max_logprobs = max_logprobs
        self._kv_dtype = self.model.config.dtype if kv_dtype == "auto" else kv_dtype
        speculation, draft = options.speculation(speculative_config, self.model, mesh)
        num_blocks, max_model_len = memory.choose_sizes(
            self.model,
            draft,
            block_size=block_size,
            kv_dtype=self._kv_dtype,
            num_blocks=num_blocks,
            memory_fraction=memory_fraction,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            attention=attention,
            mesh=mesh,
        )
        config = _with_places(
            EngineConfig(
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_requests=max_num_requests or max_num_seqs + max_num_prefixes,
                max_num_prefixes=max_num_prefixes,
                max_num_stop_ids=max_num_stop_ids,
                policy=policy,
                policy_parameters=tuple(policy_parameters),
                preemption=preemption,
                num_swap_blocks=num_swap_blocks,
                max_prompt_chunk=max_prompt_chunk,
                watermark=watermark,
                enable_prefix_caching=enable_prefix_caching,
                attention=attention,
                cascade=cascade,
                speculation=speculation,
                num_recorded_events=NUM_RECORDED_EVENTS,
                num_recorded_steps=NUM_RECORDED_STEPS,
            ),
            max_num_requests,
        )
        self._host: EngineHost | None = EngineHost(
            self.model,
            config,
            draft=draft,
            kv_dtype=self._kv_dtype,
            mesh=mesh,
            seed=seed,
            check_invariants=check_invariants,
        )
        vocab_size = self.model.config.vocab_size

        # It must not hold the LLM, whose memory is free when its last user lets it go.
        def grow(config: EngineConfig, params: Sequence[Params]) -> EngineConfig:
            grown = intake.grow(config, params, vocab_size)
            return _with_places(grown, max_num_requests)

        self._batch = Batch(self._host, grow)
        self._num_arrivals = 0
        self._num_prompt_tokens = 0

    @property
    def config(self) -> EngineConfig:
        """The engine's sizes; they grow with what requests ask for."""
        return self._batch.host.config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
        progress: bool = True,
        *,
        on_error: Literal["raise", "return"] = "raise",
        on_output: Callable[[int, RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput for each prompt, in order.

        Args:
          prompts: a text, a list of token ids, or a list of either.
          params: one for all, or one for each prompt; None is SamplingParams().
          progress: show a bar on stderr, where that is a terminal or a notebook.
          on_error: all requests are checked before anything runs. "raise" refuses the
            call with all that is wrong; "return" runs the others, and gives for a
            wrong one a RequestOutput without outputs that has its `error`.
          on_output: called with (place in `prompts`, output) as soon as one is ready.

        Raises:
          ValueError: requests that are wrong, by their places in `prompts`.
        """
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error: wanted 'raise' or 'return', got {on_error!r}")
        jobs, outputs = self._jobs(prompts, params, on_error=on_error)
        bar = tqdm(
            total=len(outputs),
            unit="request",
            delay=0.5,
            # A notebook's stderr is no terminal, but shows a bar well.
            disable=(None if "ipykernel" not in sys.modules else False)
            if progress
            else True,
        )
        with bar:
            for index, output in enumerate(outputs):
                if output is not None:
                    _report(bar, index, output, on_output)
            for job in jobs:
                job.is_awaited = on_output is not None or not bar.disable
            with contextlib.closing(self._follow(jobs)) as followed:
                for news in followed:
                    if news.is_over:
                        index, output = news.job.index, news.job.output()
                        outputs[index] = output
                        _report(bar, index, output, on_output)
                    bar.set_postfix_str(f"{self._tokens_per_s():.0f} tokens/s")
        return [output for output in outputs if output is not None]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
    ) -> Iterator[Delta]:
        """Yields what each output gained, as it comes; see `generate` for arguments.

        Text comes in whole characters, and what may become a stop string is held back
        until it is known. An output's deltas put together are what `generate` gives.
        The requests are checked here and now. They are in the engine from the first
        delta on, run while somebody waits for this or for another call, and are dropped
        when the iteration ends early.
        """
        jobs, _ = self._jobs(prompts, params)
        for job in jobs:
            job.is_streamed = True
        return (delta for news in self._follow(jobs) for delta in news.deltas)

    def submit(self, prompt: Prompt, params: Params | None = None) -> Request:
        """A request that runs beside all others from now on.

            first = llm.submit("def ", SamplingParams(max_tokens=50))
            second = llm.submit("import ")
            for delta in first:  # runs both
                print(delta.text)
            output = second.output()

        Iterate it or wait for it, with or without `async`; see `jpaged.live.Request`.
        Where the engine has no place for it, it waits in a queue, as those of
        `generate` do.

        Raises:
          ValueError: the request is wrong; others are not concerned.
        """
        job = self._live_job(prompt, params)
        self._batch.add([job])
        return Request(self._batch, job)

    def astream(
        self, prompt: Prompt, params: Params | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Yields what the outputs of one request gain, as an async iterator.

        Any number of coroutines can do so at the same time, and share the engine's
        batch: each `await` lets the others run, submit and abort, while a thread runs
        the next steps for all of them. The request is checked here and now, begins with
        the first delta, and is aborted where the iteration ends early; wrap it in
        `contextlib.aclosing` for that to happen at once.

        Raises:
          ValueError: the request is wrong.
        """
        job = self._live_job(prompt, params)

        async def deltas() -> AsyncGenerator[Delta, None]:
            self._open_host()
            self._batch.add([job])
            request = Request(self._batch, job)
            try:
                async for delta in request:
                    yield delta
            finally:
                request.abort()

        return deltas()

    def abort(self, request: Request | int) -> None:
        """Ends a request that is open, of any call; its finish_reason is "abort".

        Its outputs are what they are until now; those of an algorithm, such as beams,
        are not known before its end, and stay empty.

        Args:
          request: what `submit` gave, or a request_id.

        Raises:
          ValueError: no such request is open: it never was, or has ended.
        """
        self._open_host()
        number = request.request_id if isinstance(request, Request) else request
        job = self._batch.open_job(number)
        if job is None:
            raise ValueError(
                "request: wanted one that is open, or its request_id, got "
                f"{request!r}, which has ended or never was"
            )
        self._batch.abort([job])

    def pin(self, prefix: Prompt) -> Prefix:
        """A prefix that is computed once and kept until it is released.

        Every request whose prompt begins with the same tokens maps its blocks (the last
        one is copied when it is written), which saves their memory and computation. Put
        text behind it with `Prefix.prompt`, whose tokens are sure to begin so.

            with llm.pin(instructions) as prefix:
                outputs = llm.generate([prefix.prompt(text) for text in texts])

        Args:
          prefix: a text or a list of token ids.

        Raises:
          ValueError: it is not a prompt; max_num_prefixes are pinned; or it is too
            long for the pool.

        Source: paper section 4.4, shared prefix.
        """
        host = self._open_host()
        with host.lock:
            return Prefix(host, self.tokenizer, self._intake().token_ids(prefix))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: Params | Sequence[Params] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """One RequestOutput for each conversation: `generate` after its chat template.

        Args:
          messages: `[{"role": "user", "content": "..."}, ...]`, or a list of such.
          params: as for `generate`.
          add_generation_prompt: end the prompt with the head of an answer.
          chat_template: source of a template, or the name of one of the folder's;
            None takes the folder's own.
          tools: JSON schemas of functions, for templates that tell the model of them.
          options: the other arguments of `generate`.

        Raises:
          ValueError: no template; messages that it refuses; see `chat.render`.
        """
        prompts = conversations.prompts(
            self.tokenizer,
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
        )
        return self.generate(prompts, params, **options)

    def score(
        self, prompts: Prompt | Sequence[Prompt], continuations: Prompt | Sequence[Any]
    ) -> list[Score]:
        """How likely the model finds each continuation after its prompt.

        A continuation's text is tokenized on its own, without special tokens. Padded
        to few shapes and computed in batches, beside the engine; no pages are used.

        Args:
          prompts: a text, a list of token ids, or a list of either.
          continuations: the same, one for each prompt.

        Raises:
          ValueError: see `scoring.score`; also where the numbers differ.
        """
        self._open_host()
        pairs = conversations.pairs(self.tokenizer, prompts, continuations)
        return scoring.score(self.model, *pairs)

    def perplexity(
        self,
        text: Prompt | os.PathLike[str],
        *,
        window: int | None = None,
        overlap: int | None = None,
    ) -> Perplexity:
        """How well the model predicts a text, or that of a file (a `pathlib.Path`).

        See `scoring.perplexity` for the arguments and errors.
        """
        self._open_host()
        if isinstance(text, os.PathLike):
            text = scoring.read_text(pathlib.Path(text))
        return scoring.perplexity(
            self.model,
            conversations.token_ids(self.tokenizer, "text", text),
            window=window,
            overlap=overlap,
            num_characters=len(text) if isinstance(text, str) else 0,
        )

    def check(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
    ) -> list[str | None]:
        """For each prompt why `generate` would refuse it, or None; nothing runs."""
        prompts, params = intake.pairs(prompts, params)
        check = self._intake().check
        return [
            check(prompt, param).error
            for prompt, param in zip(prompts, params, strict=True)
        ]

    def stats(self) -> dict[str, int | float]:
        """What happened since this LLM was made, as a flat dict of numbers.

        kv_token_share: token states / slots of blocks in use; blocks_saved_by_sharing:
        share of the blocks that would be needed without sharing; both are means over
        steps. prefix_hit_ratio: share of the prompts' tokens that were mapped, from the
        prefix cache, another request or a pinned prefix, and not computed.
        num_cached_blocks: of full blocks whose contents can be found, in use or not;
        those that are not in use count as free too. tokens_per_s: generated tokens by
        the seconds of running steps, without compiling. num_compilations: of the
        engine's program. mean_queue_s and the other means: see `metrics.latencies`,
        over the num_finished_requests that ended by themselves. num_lost_events:
        happened in slices of so many that nobody saw them.

        Of several replicas, blocks, bytes, steps and tokens are sums, and shares are of
        the sums; `replica_stats` has them one by one.
        """
        host = self._open_host()
        with host.lock:
            self._batch.end_aborted()
            num_free_blocks, num_cached_blocks = host.known_blocks()
        num_blocks = self.config.num_blocks * host.num_replicas
        size = memory.block_bytes(
            self.model.config,
            self.config.block_size,
            self._kv_dtype,
            self.config.attention,
        )
        return {
            "num_replicas": host.num_replicas,
            "num_blocks": num_blocks,
            "block_size": self.config.block_size,
            "kv_bytes": size * num_blocks,
            "num_free_blocks": int(num_free_blocks.sum()),
            "num_cached_blocks": int(num_cached_blocks.sum()),
            **metrics.engine_stats(host.counters),
            "num_compilations": host.num_compilations,
            "compile_s": host.compile_s,
            "run_s": host.run_s,
            "prompt_tokens": self._num_prompt_tokens,
            "generated_tokens": self._batch.num_generated,
            "tokens_per_s": self._tokens_per_s(),
            "num_finished_requests": self._batch.means.num_requests,
            **self._batch.means.means(),
            "num_lost_events": host.num_lost_events,
        }

    def replica_stats(self) -> list[dict[str, int | float]]:
        """Of each replica what `stats` has of its engine: blocks, steps, tokens.

        One dict, where the mesh has no replicas.
        """
        host = self._open_host()
        with host.lock:
            self._batch.end_aborted()
            num_free_blocks, num_cached_blocks = host.known_blocks()
        return [
            {
                "num_blocks": self.config.num_blocks,
                "num_free_blocks": int(num_free_blocks[replica]),
                "num_cached_blocks": int(num_cached_blocks[replica]),
                **metrics.engine_stats(
                    {n: c[replica].item() for n, c in host.counters_of_each.items()}
                ),
            }
            for replica in range(host.num_replicas)
        ]

    def timeline(self, replica: int = 0) -> list[StepRecord]:
        """The engine's last steps, oldest first: memory, queue and tokens of each.

        Rows of a table: `csv.writer(file).writerows([StepRecord._fields, *rows])`.
        At most 65,536 are kept. Replicas over `data` have steps of their own.

        Raises:
          ValueError: there is no such replica.
        """
        host = self._open_host()
        if not 0 <= replica < host.num_replicas:
            raise ValueError(
                f"replica: wanted 0 to {host.num_replicas - 1}, got {replica!r}"
            )
        with host.lock:
            return host.step_records(replica)

    def reset_prefix_cache(self) -> None:
        """Forgets what the blocks hold, as after a change of the model's weights.

        Requests that run keep their blocks. Pinned prefixes are computed again.
        """
        host = self._open_host()
        with host.lock:
            host.reset_prefix_cache()

    def close(self) -> None:
        """Aborts what is open, and lets go of the model and the pool.

        A second time it does nothing.
        """
        if self._host is not None:
            self._batch.close()
            self._host = None
            del self.model

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        sizes = "closed"
        if self._host is not None:
            sizes = (
                f"dtype={self.model.config.dtype!r}, "
                f"num_blocks={self.config.num_blocks}, "
                f"block_size={self.config.block_size}, "
                f"max_num_seqs={self.config.max_num_seqs}, "
                f"max_model_len={self.config.max_model_len}"
            )
        return f"LLM({self._name!r}, {sizes})"

    def _tokens_per_s(self) -> float:
        host = self._open_host()
        return host.counters["num_generated"] / host.run_s if host.run_s else 0.0

    def _open_host(self) -> EngineHost:
        if self._host is None:
            raise RuntimeError("this LLM was closed; make a new one")
        return self._host

    def _follow(self, jobs: list[Job]) -> Generator[News, None, None]:
        """`Batch.follow`, by a caller that may have waited until the LLM was closed."""
        self._open_host()
        yield from self._batch.follow(jobs)

    def _intake(self) -> intake.Intake:
        return intake.Intake(
            self.model.config,
            self.tokenizer,
            self.config,
            self.max_logprobs,
            self._open_host().num_open_blocks(),
        )

    def _jobs(
        self, prompts: Any, params: Any, *, on_error: str = "raise"
    ) -> tuple[list[Job], list[RequestOutput | None]]:
        """The requests that can run, and for each prompt its output if it cannot."""
        prompts, params = intake.pairs(prompts, params)
        self._open_host()
        inbox: collections.deque[News] = collections.deque()
        jobs, outputs, errors = [], [], []
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            arrival = self._num_arrivals + index
            made = self._job(prompt, param, index, arrival, inbox)
            if isinstance(made, Job):
                jobs.append(made)
                outputs.append(None)
            else:
                outputs.append(made)
                errors.append(f"prompts[{index}]: {made.error}")
        if errors and on_error == "raise":
            head = f"{len(errors)} of {len(prompts)} requests are wrong, none was run:"
            message = "\n  ".join([head, *errors]) if len(prompts) > 1 else errors[0]
            raise ValueError(message)
        self._num_arrivals += len(prompts)
        self._num_prompt_tokens += sum(len(job.prompt_token_ids) for job in jobs)
        return jobs, outputs

    def _live_job(self, prompt: Any, params: Any) -> Job:
        """A request that is not one of a call's; ValueError if it is wrong."""
        self._open_host()
        params = SamplingParams() if params is None else params
        number = self._num_arrivals
        job = self._job(prompt, params, number, number, collections.deque())
        if not isinstance(job, Job):
            raise ValueError(job.error)
        job.is_streamed = True
        self._num_arrivals += 1
        self._num_prompt_tokens += len(job.prompt_token_ids)
        return job

    def _job(
        self,
        prompt: Any,
        params: Any,
        index: int,
        arrival: int,
        inbox: collections.deque[News],
    ) -> Job | RequestOutput:
        """The request if it can run, else its output, which says why not."""
        token_ids, params, error = self._intake().check(prompt, params)
        text = prompt if isinstance(prompt, str) else None
        if error is not None:
            return RequestOutput(arrival, text, token_ids, [], error=error)
        vocab_size = self.model.config.vocab_size
        config = intake.grow(self.config, [params], vocab_size)
        shape = limits.request_shape(params, config, vocab_size)
        num_outputs = len(shape.outputs(shape.numbers))
        if isinstance(params, BeamSearchParams) and params.num_return is not None:
            num_outputs = params.num_return
        return Job(
            index=index,
            arrival=arrival,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            eos_token_ids=self.model.config.eos_token_ids,
            tokenizer=self.tokenizer,
            table_size=len(shape.numbers),
            num_outputs=num_outputs,
            inbox=inbox,
        )


def _with_places(config: EngineConfig, max_num_requests: int | None) -> EngineConfig:
    """`config` with the request table's places, where the user left them open."""
    if max_num_requests is not None:
        return config
    seq_indices = memory.max_places(
        config.num_rows, config.max_model_len, config.num_logprobs
    )
    return dataclasses.replace(config, max_num_requests=seq_indices)


def _report(
    bar: tqdm[Any],
    index: int,
    output: RequestOutput,
    on_output: Callable[[int, RequestOutput], None] | None,
) -> None:
    """Counts a finished request, and hands it on without the bar in the way."""
    bar.update()
    if on_output is not None:
        with tqdm.external_write_mode(file=sys.stdout):
            on_output(index, output)
