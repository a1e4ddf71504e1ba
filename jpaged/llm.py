"""LLM: the public class. Prompts in, text out, and statistics.

Pipeline: user -> [llm] -> serving -> engine, and back. Names and meanings follow vLLM
where it has them. This module only forwards: `serving.construction` creates the parts,
`serving.intake` checks requests, `serving.batcher` runs them.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import (
    AsyncGenerator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, Literal

from flax import nnx
from jax.sharding import Mesh

from jpaged import compilation_cache
from jpaged.config import EngineConfig
from jpaged.engine import replicas
from jpaged.engine.limits import Params
from jpaged.engine.state import layers_of_block
from jpaged.models import scoring
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.models.scoring import Perplexity, Score
from jpaged.names import checked_names, either, errors_of
from jpaged.outputs import RequestOutput, TreeSearchOutput
from jpaged.policies import BudgetPolicy, EvictionPolicy, Policy
from jpaged.progress import Progress
from jpaged.prompts import Prompt
from jpaged.retention import Retention
from jpaged.search import TreeSearchParams
from jpaged.serving import construction, memory, stats
from jpaged.serving.collect import collect_outputs
from jpaged.serving.engine_host import EngineHost
from jpaged.serving.intake import Intake
from jpaged.serving.live import Request
from jpaged.serving.metrics import StepRecord
from jpaged.serving.options import LLMOptions
from jpaged.serving.pausing import MODES
from jpaged.serving.prefix import Prefix
from jpaged.serving.report import report_choice
from jpaged.serving.request_state import Delta, RequestState, RequestUpdate
from jpaged.serving.tree_searching import run_searches
from jpaged.serving.vllm_methods import (
    VllmMethods,
    default_params,
    sampling_defaults,
)
from jpaged.serving.vllm_names import LLM_ARGUMENTS, REQUEST_ARGUMENTS, llm_arguments
from jpaged.serving.weight_reading import UpdateOptions
from jpaged.serving.weight_update import WeightUpdate, WeightUpdater
from jpaged.serving.weights import WeightsWatch, check_replacement
from jpaged.text import chat
from jpaged.text import prompts as text_prompts
from jpaged.text.tokenizer import Tokenizer
from jpaged.validation import integer, one_of

_NAMES = REQUEST_ARGUMENTS
Messages = Sequence[Mapping[str, Any]]


class LLM(VllmMethods):
    """A language model that generates text: weights, tokenizer, KV pool and engine.

    Args:
      model: folder in Hugging Face layout; a GGUF file; a hub id ("org/name" or
        "hf://org/name"); the name of a bundled or packaged model; "random:" followed by
        the name of a shape, see `models.shapes`; or a Decoder.
      dtype: "float32", "bfloat16" or "float16" ("half"), or such a dtype of NumPy or
        JAX; "auto" is the checkpoint's dtype, and float32 on a CPU.
      kv_dtype: dtype of keys and values in the pool; "auto" is the model's. "int8" and
        "fp8" store 8 bits per number, with a float32 scale per token and head.
      block_size: tokens per KV block.
      num_blocks: blocks of the pool, per replica; a block stores `block_size` tokens of
        all layers (see `cache_groups`). None is what `max_num_seqs` sequences
        of `max_model_len` tokens can fill, limited to `memory_fraction` of the device's
        free memory; on a CPU also limited to 1 GiB, or to the model's own size if that
        is more.
      memory_fraction: see `num_blocks`.
      max_num_seqs: number of sequences that run at the same time, per replica; others
        wait.
      max_model_len: maximum number of tokens of prompt and output together. None is the
        model's maximum, limited so that one such sequence fits into the pool; a warning
        is logged if this limits it.
      max_num_batched_tokens: maximum number of tokens per step, prompt chunks and
        decoded tokens together.
      enable_prefix_caching: keep the blocks of finished requests while there is space.
        Prompts with the same first tokens map these blocks instead of computing them
        again.
      preemption: what happens to the latest requests when blocks run out. "recompute"
        frees their blocks and computes them again later. "swap" copies the blocks to
        the host pool and back, as far as it has space, and admits no other request
        meanwhile.
      num_swap_blocks: blocks of the host pool, with preemption="swap".
      policy: order in which waiting requests are admitted, also of those that wait on
        the host for space in the request table. "fcfs": by arrival.
        "priority": smallest `SamplingParams.priority` first. "shortest_prompt".
        "longest_prefix": most cached prompt tokens first. "shortest_job",
        "earliest_deadline", "feedback", "fair_share". Or a function, see
        `jpaged.policies`.
      policy_parameters: numbers that the policy reads.
      preemption_policy, eviction_policy, budget_policy: which running request gives
        back its blocks, which block of the prefix cache is evicted, and how many tokens
        each sequence computes in a step: names or functions, see `jpaged.policies`.
        `preemption_parameters` and so on are numbers that they read.
      retention: which blocks of a sequence stay in the pool: the name of a method, or
        a `jpaged.retention.Retention` with other parameters or functions of your own;
        None keeps all. See docs/retention.md.
      attention: implementation of paged attention; None is the best one for the
        device.
      mesh: devices that share the model and the pages, as `jpaged.make_mesh` returns
        them and split by the rules of `jpaged.parallel`; None is one device. Each
        replica over the mesh axis `data` has its own pool, request table and schedule,
        of the sizes given here; `serving.routing` assigns requests to replicas. If the
        devices belong to several processes, each process creates the same LLM, makes
        the same calls in the same order, and gets all outputs (docs/hosts.md).
      seed: requests without a seed derive one from this seed and their number. None
        chooses one at random; the attribute `seed` has it.
      speculative_config: guess several tokens ahead. This changes no token, only how
        many are generated per step. {"method": "ngram", "num_speculative_tokens": 4}
        guesses the continuation of an earlier occurrence of the last
        `prompt_lookup_max` (3) to `prompt_lookup_min` (1) tokens. {"model": ...} names
        a smaller model with the same vocabulary.
      tokenizer: a folder with tokenizer.json, or a Tokenizer, for a `model` that is a
        Decoder. None is the tokenizer of the model's folder.
      max_num_requests: entries of the request table, for waiting and running sequences.
        None is four times the sum of `max_num_seqs` and `max_num_prefixes`, or less
        where entries are large. A call may have any number of prompts.
      max_num_stop_ids: maximum number of stop tokens per request, EOS included.
      max_logprobs: maximum of `SamplingParams.logprobs` and `prompt_logprobs`; -1 is
        the vocabulary's size.
      max_num_prefixes: number of prefixes that can be pinned at the same time, see
        `pin`.
      max_prompt_chunk: maximum number of tokens of one prompt per step; None is
        `max_num_batched_tokens`.
      watermark: share of the blocks that admission leaves free while requests run.
      check_invariants: check the engine's state on the host after every step, and raise
        RuntimeError if it is inconsistent. For debugging: costs milliseconds per step.
      quantization: "int8" stores the weights of the layers' products and of the output
        in 8 bits.
      cascade: samples, beams and prompts with a shared prefix read its keys and values
        together, where this is faster.
      logprobs_mode: which distribution the log-probabilities of outputs are of. "raw":
        the model's, before temperature, filters and rules. "processed": the one that
        the token was sampled from, after all of these; tokens that could not be sampled
        have -inf. Greedy outputs have temperature 1 and no filters. Log-probabilities
        of prompts are always the model's.
      batch_invariant: compute so that the bits of a token's logits depend on its own
        sequence alone: not on the batch, the chunks of prompts, the prefix cache, the
        block size or preemptions. They equal those of `model(tokens)` inside
        `jpaged.rl.batch_invariant()`. Slower, see docs/rollouts.md.
      cache_groups: layers with a sliding window give blocks back as it moves. Layers
        with different windows get block tables of their own, and each block of
        `num_blocks` and `num_swap_blocks` is divided into one per table, which is what
        `stats` counts. Changes no token, see docs/memory.md. Without effect if no
        window is shorter than `max_model_len`, or a draft model's layers see more than
        the target's groups keep.

    The first call compiles a few small programs, and the first call with a feature
    (sampling, log-probabilities, beams, an algorithm) one more. Programs for other
    numbers of sequences and tokens are compiled beside the run. `warm_up` compiles in
    advance, `close` frees the programs, and docs/compilation.md says when and why.
    Compiled programs are also stored in a cache folder of the user, see
    `jpaged.compilation_cache`.

    vLLM's names of arguments are accepted where they mean the same
    (`gpu_memory_utilization`, `tensor_parallel_size`, `kv_cache_dtype` and others);
    otherwise the error says what to use instead, see `serving.vllm_names`.

    What was chosen (dtype, blocks, kernels) is reported once on stderr, by the logger
    "jpaged"; see `jpaged.log` for how to turn this off.

    An LLM is not thread-safe.

    Raises:
      ValueError: an argument is invalid or unsupported.
      FileNotFoundError: the folder does not exist or is not a checkpoint.
    """

    @checked_names("LLM", LLM_ARGUMENTS, llm_arguments)
    def __init__(
        self,
        model: str | os.PathLike[str] | Decoder,
        dtype: Any = "auto",
        kv_dtype: Any = "auto",
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
        mesh: Mesh | None = None,
        seed: int | None = 0,
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
        logprobs_mode: str = "raw",
        batch_invariant: bool = False,
        preemption_policy: str | Policy = "latest",
        preemption_parameters: Sequence[float] = (),
        eviction_policy: str | EvictionPolicy = "lru",
        eviction_parameters: Sequence[float] = (),
        budget_policy: str | BudgetPolicy = "decode_first",
        budget_parameters: Sequence[float] = (),
        cache_groups: bool = True,
        retention: str | Retention | None = None,
    ):
        arguments = dict(locals())
        del arguments["self"]
        options = LLMOptions(**arguments)
        compilation_cache.turn_on()
        parts = construction.build_parts(options)
        self._weights = WeightsWatch(parts.model)
        self._updater = WeightUpdater()
        self.tokenizer = parts.tokenizer
        self.seed = options.seed
        self.max_logprobs = options.max_logprobs
        self._name = parts.name
        self._kv_dtype = parts.kv_dtype
        self._host: EngineHost | None = parts.host
        self._batcher = parts.batcher
        self._sampling_defaults = sampling_defaults(model, parts.tokenizer)
        self._intake = Intake(
            parts.host,
            parts.tokenizer,
            options.max_logprobs,
            functools.partial(default_params, self._sampling_defaults),
        )
        report_choice(self.__repr__(), self._host.num_replicas, self._sampling_defaults)

    @property
    def model(self) -> Decoder:
        """The model. A Decoder of the same config can be assigned.

        Its arrays may also be replaced in place (`flax.nnx.update`). The next call
        notices this, and drops what was cached with the old weights: requests that run
        compute their tokens again. See also `update_weights`.
        """
        return self._open_host().model

    @model.setter
    def model(self, model: Decoder) -> None:
        host = self._open_host()
        check_replacement(host.model, model, self._batcher.num_open)
        with host.lock:
            if host.runner.mesh is not None:
                model = replicas.shard_model(model, host.runner.mesh)
            host.use_model(model)
            host.change_weights()
            self._weights.remember(model)
            self._updater.forget()

    def update_weights(
        self,
        weights: Decoder | nnx.State | Mapping[Any, Any] | str | os.PathLike[str],
        *,
        prefix_cache: Literal["reset", "keep"] = "reset",
        requests: Literal["recompute", "keep", "abort"] | None = None,
        copy: bool = True,
        cast: bool = False,
        check_finite: bool = True,
        lora_alpha: float | None = None,
    ) -> WeightUpdate:
        """Replace the model's weights, for example after a step of a trainer.

        Compiles no program, and needs memory for one array beside the old weights.
        Everything is checked first: after an error the old weights are in use, and
        requests that run are not affected. Open requests go on as `requests` says;
        pinned prefixes are computed again.

            llm.update_weights(nnx.state(policy))

        Args:
          weights: a Decoder of the same config; its nnx state; a pytree with the names
            of its parameters (also flat, {"layers.0.mlp.up.weight": array}); or a
            folder or name, as for `LLM`. Arrays on other devices or with another
            sharding are sent from device to device. A pytree that has only adapters
            (`NAME_lora_a` and `NAME_lora_b`, as qwix names its `nnx.LoRAParam`s)
            replaces the adapters; the LLM adds alpha / rank * a @ b to its weights.
          prefix_cache: "reset" empties the prefix cache. "keep" keeps keys and values
            that the old weights have computed, also of pinned prefixes: outputs are
            then those of neither version.
          requests: what happens to requests that run. "recompute" (default): they
            compute their tokens again, so each further token is sampled from the new
            model. "keep": they go on with the keys and values that they have, which is
            faster; later tokens attend to those of the old weights. "abort": they end
            with the tokens they have, finish_reason "abort". With prefix_cache="keep"
            the default is "keep".
          copy: give the LLM arrays of its own. False uses the arrays themselves, where
            devices and dtypes allow: nothing is copied, and a caller must not donate
            them.
          cast: convert floats to the LLM's dtype, and quantise them if the LLM is
            quantised. False raises an error for another dtype.
          check_finite: raise an error if a value is NaN or infinite.
          lora_alpha: alpha of adapters.

        Returns:
          The number of updates so far, and what this one has taken.

        Raises:
          ValueError: an argument is invalid; or an array is missing, unknown, deleted
            or not finite, or has another shape or dtype. The message names it.
          FileNotFoundError: a folder does not exist or is not a checkpoint.
          RuntimeError: another update runs, or the LLM is closed.
        """
        host = self._open_host()
        options = UpdateOptions(
            prefix_cache, requests, copy, cast, check_finite, lora_alpha
        )
        update = self._updater.update(host, self._batcher, weights, options)
        self._weights.remember(host.model)
        return update

    @property
    def weights_version(self) -> int:
        """Number of calls of `update_weights` that have succeeded."""
        return self._updater.version

    def pause(self, mode: Literal["keep", "wait", "abort"] = "keep") -> None:
        """Stop running requests until `resume`, for example to update the weights.

        Returns when no step runs. Requests can be submitted meanwhile, and wait: other
        threads and coroutines that wait for them sleep until `resume`. In this thread,
        calls that would wait for themselves raise RuntimeError. `update_weights`,
        `abort`, `score` and `perplexity` work as usual.

        Args:
          mode: what happens to open requests. "keep" freezes them; they go on after
            `resume`. "wait" lets them finish first. "abort" ends them with the tokens
            they have.

        Raises:
          ValueError: the mode is unknown.
        """
        host = self._open_host()
        one_of("mode", mode, MODES)
        if mode == "wait":
            self._batcher.finish_open()
        with host.lock:
            self._batcher.pause.set()
            if mode == "abort":
                self._batcher.abort_open()

    def resume(self) -> None:
        """End a pause; without one, nothing happens."""
        self._open_host()
        self._batcher.pause.clear()

    @property
    def is_paused(self) -> bool:
        """Whether the LLM is paused."""
        return self._batcher.pause.is_set

    @property
    def _model_config(self) -> ModelConfig:
        return self.model.config

    @property
    def config(self) -> EngineConfig:
        """The engine's sizes and features; features grow with what requests need."""
        return self._batcher.host.config

    @checked_names("generate", _NAMES)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
        progress: Progress = True,
        *,
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: Progress | None = None,
        on_error: Literal["raise", "return"] = "raise",
        on_output: Callable[[int, RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate outputs for prompts.

        Args:
          prompts: a text, a list of token ids, a dict of either ({"prompt": text} or
            {"prompt_token_ids": token ids}), or a list or iterator of these.
          params: parameters for all prompts, or one for each; None is
            `get_default_sampling_params()`.
          progress: show a progress bar on stderr if it is a terminal or a notebook; or
            a function that makes the bar, such as a subclass of tqdm.
          sampling_params: vLLM's name of `params`.
          use_tqdm: vLLM's name of `progress`.
          on_error: what to do if a request is invalid. All requests are checked before
            any runs. "raise" raises ValueError with all errors. "return" runs the valid
            requests and returns a RequestOutput with `error` for each invalid one.
          on_output: called with (index in `prompts`, output) as soon as an output is
            complete.

        Returns:
          One RequestOutput per prompt, in order.

        Raises:
          ValueError: requests are invalid; the message names their indices.
        """
        if on_error not in ("raise", "return"):
            raise ValueError(
                f"on_error: expected 'raise' or 'return', got {on_error!r}"
            )
        self._batcher.pause.check()
        params = either("generate", params=params, sampling_params=sampling_params)
        progress = progress if use_tqdm is None else use_tqdm
        self._with_current_weights()
        found = self._intake.call(prompts, params, on_error)
        return collect_outputs(
            self._batcher, *found, progress=progress, on_output=on_output
        )

    @checked_names("stream", _NAMES)
    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
    ) -> Iterator[Delta]:
        """Yield what each output gains while it grows; see `generate` for arguments.

        Text comes in whole characters. Characters that can become part of a stop string
        are held back until this is certain. The concatenated deltas of an output equal
        what `generate` returns.

        The requests are checked by the call itself. They are submitted with the first
        delta, run while a caller waits for this stream or for another call, and are
        dropped if the iteration ends early.
        """
        self._with_current_weights()
        requests, _ = self._intake.call(prompts, params)
        for request in requests:
            request.is_streamed = True
        return (delta for update in self._follow(requests) for delta in update.deltas)

    @checked_names("submit", _NAMES)
    def submit(self, prompt: Prompt, params: Params | None = None) -> Request:
        """Submit a request that runs beside all others from now on.

            first = llm.submit("def ", SamplingParams(max_tokens=50))
            second = llm.submit("import ")
            for delta in first:  # runs both
                print(delta.text)
            output = second.output()

        Iterate over the request or wait for it, with or without `async`; see
        `serving.live.Request`. If the request table is full, it waits in a queue as
        the requests of `generate` do.

        Raises:
          ValueError: the request is invalid; other requests are not affected.
        """
        self._with_current_weights()
        state = self._intake.live(prompt, params)
        self._batcher.add([state])
        return Request(self._batcher, state)

    @checked_names("astream", _NAMES)
    def astream(
        self, prompt: Prompt, params: Params | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Yield what the outputs of one request gain, as an async iterator.

        Any number of coroutines can iterate at the same time and share the engine's
        batch: each `await` lets the others run, submit and abort, while a thread runs
        the next steps for all of them. The request is checked by the call itself, is
        submitted with the first delta, and is aborted if the iteration ends early; use
        `contextlib.aclosing` to abort it at once.

        Raises:
          ValueError: the request is invalid.
        """
        self._with_current_weights()
        state = self._intake.live(prompt, params)

        async def deltas() -> AsyncGenerator[Delta, None]:
            self._with_current_weights()
            self._batcher.add([state])
            request = Request(self._batcher, state)
            try:
                async for delta in request:
                    yield delta
            finally:
                request.abort()

        return deltas()

    def abort(self, request: Request | int) -> None:
        """End an open request of any call, with finish_reason "abort".

        Its outputs keep the tokens that they have. Those of an algorithm, beams
        included, are unknown before its end and stay empty.

        Args:
          request: what `submit` returned, or a request_id.

        Raises:
          ValueError: no such request is open: it has ended or never existed.
        """
        self._open_host()
        number = request.request_id if isinstance(request, Request) else request
        state = self._batcher.find_open(number)
        if state is None:
            raise ValueError(
                "request: expected an open request or its request_id, got "
                f"{request!r}, which has ended or never existed"
            )
        self._batcher.abort([state])

    def run_slice(self, seconds: float | None = None) -> bool:
        """Run a few steps for all open requests.

        For a server with a thread of its own for the engine. Other threads may
        `submit` meanwhile, one at a time, and read `Request.deltas`. Callers that
        iterate over requests or wait for them need not call this.

        Args:
          seconds: length of the slice if a request is streamed or live, one step at
            least; None is 0.05, up to 0.3 where steps are slow.

        Returns:
          Whether requests are still open.
        """
        self._open_host()
        self._batcher.run_slice(seconds)
        return self._batcher.num_open > 0

    def pin(self, prefix: Prompt) -> Prefix:
        """Compute a prefix once and keep it until it is released.

        Every request whose prompt starts with the same tokens maps its blocks, which
        saves their memory and computation (the last block is copied when a request
        writes to it). `Prefix.prompt` appends text in a way that keeps these tokens.

            with llm.pin(instructions) as prefix:
                outputs = llm.generate([prefix.prompt(text) for text in texts])

        Args:
          prefix: a text or a list of token ids.

        Raises:
          ValueError: `prefix` is not a prompt, `max_num_prefixes` are pinned, or the
            prefix is too long for the pool.

        Source: paper section 4.4, shared prefix.
        """
        host = self._with_current_weights()
        with host.lock:
            return Prefix(host, self.tokenizer, self._intake.token_ids(prefix))

    @checked_names("chat", _NAMES)
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: Params | Sequence[Params] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: Progress = True,
        *,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: Progress | None = None,
        on_error: Literal["raise", "return"] = "raise",
        on_output: Callable[[int, RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate answers to conversations, with the model's chat template.

        Args:
          messages: `[{"role": "user", "content": "..."}, ...]`, or a list of these.
            The content is a text or a list of `{"type": "text", "text": ...}`.
          params: as for `generate`.
          add_generation_prompt: end the prompt with the header of the answer.
          chat_template: source of a template, or the name of one in the model's folder;
            None is the folder's default.
          tools: JSON schemas of functions, for templates that support them.
          continue_final_message: end the prompt within the last message, which the
            output continues; needs `add_generation_prompt=False`.
          chat_template_kwargs: further variables of the template.
          progress, sampling_params, use_tqdm, on_error, on_output: as for `generate`.

        Returns:
          One RequestOutput per conversation, in order.

        Raises:
          ValueError: there is no template, or it refuses the messages, see
            `text.chat.render`; or requests are invalid.
        """
        progress = progress if use_tqdm is None else use_tqdm
        if on_error not in ("raise", "return"):
            raise ValueError(
                f"chat: on_error: expected 'raise' or 'return', got {on_error!r}"
            )
        with errors_of("chat"):
            params = either("chat", params=params, sampling_params=sampling_params)
            texts = chat.chat_texts(
                self.tokenizer,
                messages,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            prompts = chat.encoded(self.tokenizer, texts)
            self._with_current_weights()
            found = self._intake.call(prompts, params, on_error, "messages")
        return collect_outputs(
            self._batcher, *found, progress=progress, on_output=on_output
        )

    def tree_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: TreeSearchParams | None = None,
    ) -> list[TreeSearchOutput]:
        """Search for a text after each prompt, by Monte Carlo tree search.

        All nodes of a tree are texts in the pool: they share the blocks of their common
        tokens, and each simulation computes one token of one new node per prompt. The
        searches use free blocks, and open requests wait until they end. See
        docs/decoding.md.

            params = TreeSearchParams(num_simulations=64, max_tokens=20)
            (output,) = llm.tree_search("def ", params)
            print(output.outputs[0].text, output.steps[0].visits)

        Args:
          prompts: a text, a list of token ids, or a list of either.
          params: parameters of all searches; None is `TreeSearchParams()`.

        Returns:
          One TreeSearchOutput per prompt, in order.

        Raises:
          ValueError: an argument is invalid; a search does not fit into the free
            blocks; or the LLM has a mesh or a retention method.
        """
        host = self._with_current_weights()
        with errors_of("tree_search"), host.lock:
            host.recover()
            return run_searches(host, self.tokenizer, prompts, params, self.seed)

    def score(
        self, prompts: Prompt | Sequence[Prompt], continuations: Prompt | Sequence[Any]
    ) -> list[Score]:
        """Return how probable the model finds each continuation after its prompt.

        The text of a continuation is tokenized without special tokens. The model runs
        on padded batches of few shapes, beside the engine and without pages.

        Args:
          prompts: a text, a list of token ids, or a list of either.
          continuations: the same, one for each prompt.

        Raises:
          ValueError: the numbers of prompts and continuations differ; see also
            `scoring.score`.
        """
        self._open_host()
        pairs = text_prompts.scoring_pairs(self.tokenizer, prompts, continuations)
        length = self.config.max_model_len
        return scoring.score(self.model, *pairs, length=length)

    def perplexity(
        self,
        text: Prompt | os.PathLike[str],
        *,
        window: int | None = None,
        overlap: int | None = None,
    ) -> Perplexity:
        """Return how well the model predicts a text, or a file (a `pathlib.Path`).

        See `scoring.perplexity` for the arguments and errors.
        """
        self._open_host()
        if isinstance(text, os.PathLike):
            text = scoring.read_text(pathlib.Path(text))
        return scoring.perplexity(
            self.model,
            text_prompts.token_ids(self.tokenizer, "text", text),
            window=window,
            overlap=overlap,
            num_characters=len(text_prompts.text_of(text) or ""),
            length=self.config.max_model_len,
        )

    @checked_names("check", _NAMES)
    def check(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
    ) -> list[str | None]:
        """Return for each prompt why `generate` would refuse it, or None.

        Runs no steps. See `generate` for the arguments.
        """
        self._open_host()
        return self._intake.errors(prompts, params)

    def warm_up(
        self,
        params: Params | Sequence[Params] | None = None,
        *,
        max_num_seqs: int | None = None,
    ) -> None:
        """Compile what calls with these parameters need; they compile nothing then.

        Without it, the first call with a feature waits for its first programs, and
        programs for other numbers of sequences and tokens are compiled beside the run.

        Args:
          params: parameters of later calls, one or several; only the features that they
            use matter. None is `SamplingParams()`.
          max_num_seqs: sequences that will run at the same time at most; None is the
            LLM's `max_num_seqs`.

        Raises:
          ValueError: the parameters are invalid.
          RuntimeError: the LLM is closed, or requests run and the parameters need an
            empty request table.
        """
        host = self._open_host()
        rows = host.config.max_num_seqs
        if max_num_seqs is not None:
            rows = integer("max_num_seqs", max_num_seqs, low=1, high=rows)
        self._batcher.warm_up(self._intake.check_all(params), rows)

    def stats(self) -> dict[str, Any]:
        """Return statistics since the LLM was created, as a flat dict.

        - attention: name of the backend whose kernels serve; all others are numbers.
        - kv_token_share: token states divided by slots of used blocks.
          blocks_saved_by_sharing: share of the blocks that would be needed without
          sharing. Both are means over steps.
        - prefix_hit_ratio: share of the prompts' tokens that were mapped from the
          prefix cache, another request or a pinned prefix, and not computed.
        - num_cached_blocks: full blocks that the prefix cache can find. Those that no
          sequence uses count as free too.
        - tokens_per_s: generated tokens per second of running steps. run_s: these
          seconds, without compilation.
        - num_compilations: programs that were compiled, or loaded from the cache's
          folder. compile_s: seconds in which calls waited for them.
        - mean_queue_s and the other means: see `serving.metrics.latencies`; over the
          num_finished_requests that ended by themselves.
        - num_lost_events: events that were overwritten before the host read them.
        - num_running: sequences with a batch row now.
        - num_cache_groups: block tables of each sequence, see `LLM(cache_groups=...)`.
          max_used_kv_bytes: bytes of the most blocks in use after a step.
          kv_bytes_single_table: what they would have been then if all layers had one
          table.
        - num_dropped_tokens: tokens that retention has dropped. A sequence that is
          recomputed drops its tokens again.

        With several replicas, blocks, bytes, steps and tokens are sums, and shares are
        shares of the sums; `replica_stats` has them per replica.
        """
        host = self._open_host()
        size = memory.block_bytes(
            self.model.config,
            self.config.block_size,
            self._kv_dtype,
            self.config.attention,
            num_layers=layers_of_block(self.model.config, self.config),
            retention=self.config.retention,
        )
        return stats.llm_stats(
            host, self._batcher, size, self._intake.num_prompt_tokens
        )

    def replica_stats(self) -> list[dict[str, Any]]:
        """Return the engine's part of `stats` per replica: blocks, steps, tokens.

        The list has one dict if the mesh has no replicas.
        """
        return stats.replica_stats(self._open_host(), self._batcher)

    def timeline(self, replica: int = 0) -> list[StepRecord]:
        """Return the engine's last steps, oldest first: memory, queue and tokens.

        The records are rows of a table, which
        `csv.writer(file).writerows([StepRecord._fields, *rows])` writes. At most 65,536
        are kept. Each replica over `data` has its own steps.

        Raises:
          ValueError: there is no such replica.
        """
        host = self._open_host()
        if not 0 <= replica < host.num_replicas:
            raise ValueError(
                f"replica: expected 0 to {host.num_replicas - 1}, got {replica!r}"
            )
        with host.lock:
            return host.step_records(replica)

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache.

        Running requests keep their blocks. Pinned prefixes are computed again.
        """
        host = self._open_host()
        with host.lock:
            host.reset_prefix_cache()

    def close(self) -> None:
        """Abort open requests, and release the model and the pool.

        Further calls have no effect.
        """
        if self._host is not None:
            self._batcher.close()
            self._host = None

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
                f"{stats.group_windows(self.model.config, self.config)}"
                f"max_num_seqs={self.config.max_num_seqs}, "
                f"max_model_len={self.config.max_model_len}, "
                f"attention={stats.attention_name(self.config)!r}"
            )
        return f"LLM({self._name!r}, {sizes})"

    def _open_host(self) -> EngineHost:
        """Return the engine; raise RuntimeError if the LLM is closed."""
        if self._host is None:
            raise RuntimeError("this LLM is closed; create a new one")
        return self._host

    def _with_current_weights(self) -> EngineHost:
        """Return the engine, without anything cached if weights have changed."""
        host = self._open_host()
        self._updater.check()
        if self._weights.have_changed(host.model, host.arrays.leaves()):
            with host.lock:
                self._updater.forget()
                host.change_weights()
        return host

    def _follow(
        self, requests: list[RequestState]
    ) -> Generator[RequestUpdate, None, None]:
        """`Batcher.follow`, for a caller that may start after the LLM was closed."""
        self._with_current_weights()
        yield from self._batcher.follow(requests)
