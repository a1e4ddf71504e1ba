"""Chat in the terminal: a conversation with history, streamed.

Pipeline: stdin -> [chat] -> llm -> stdout. Host only.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from jpaged.cli import flags
from jpaged.llm import LLM
from jpaged.params import SamplingParams

MAX_TOKENS = 1024
HELP = """\
/new starts a new conversation, /undo removes the last question and answer, /exit ends.
Ctrl-C ends an answer and keeps the conversation. Lines that end with \\ continue.
"""


class Conversation:
    """The messages so far, and the model that answers.

    Args:
      llm: the model, with a tokenizer and a chat template.
      params: parameters of the answers; None leaves `max_tokens` to the context.
      system: the system message, or None.
      template: source of a chat template; None is the model's.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str | None, template: str | None
    ):
        self.messages: list[dict[str, str]] = []
        self._llm = llm
        self._params = params
        self._system = system
        self._template = template
        self.clear()

    def clear(self) -> None:
        """Start a new conversation."""
        self.messages = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})

    def undo(self) -> None:
        """Remove the last question and its answer."""
        if any(message["role"] == "user" for message in self.messages):
            while self.messages.pop()["role"] != "user":
                pass

    def answer(self, question: str) -> None:
        """Print the answer as it grows, and keep both messages.

        Ctrl-C ends the answer; what was written so far stays in the conversation. The
        oldest exchanges are left out if the conversation is too long for the model.

        Raises:
          ValueError: the question does not fit, or the template refuses it.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            request = self._llm.submit(self._prompt(), self._params)
        except ValueError:
            self.messages.pop()
            raise
        pieces: list[str] = []
        try:
            for delta in request:
                pieces.append(delta.text)
                sys.stdout.write(delta.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            request.abort()
            print("\n(interrupted)", file=sys.stderr, end="")
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _prompt(self) -> list[int]:
        """Return the prompt's tokens, without the oldest exchanges if too long."""
        first = 1 if self._system is not None else 0
        most = self._llm.config.max_model_len - 16
        while True:
            tokens = self._llm.get_tokenizer().apply_chat_template(
                self.messages, chat_template=self._template, add_generation_prompt=True
            )
            if len(tokens) <= most or len(self.messages) <= first + 2:
                return tokens
            del self.messages[first : first + 2]


def chat(args: argparse.Namespace) -> int:
    """Read questions from stdin and print answers; returns the exit status."""
    if len(args.words) > 1:
        raise ValueError(f"chat: expected no prompts, got {args.words[1]!r}")
    template = None
    if args.chat_template is not None:
        template = pathlib.Path(args.chat_template).read_text("utf-8")
    llm = flags.open_llm(args, max_num_seqs=1)
    params = _params(llm, args)
    conversation = Conversation(llm, params, args.system, template)
    # Invalid parameters and templates are reported before the first question.
    (error,) = llm.check([[0]], params)
    if error is not None:
        raise ValueError(error)
    try:
        llm.get_tokenizer().apply_chat_template(
            [{"role": "user", "content": "hello"}], chat_template=template
        )
    except ValueError as error:
        raise ValueError(
            f"{error}. On the command line: choose a --model that chats, such as "
            "smollm2-135m-instruct, pass --chat-template FILE, or give a prompt"
        ) from error
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr, end="")
    while True:
        try:
            question = _read_question()
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D ends)", file=sys.stderr)
            continue
        if question is None or question == "/exit":
            return 0
        try:
            _act(conversation, question)
        except ValueError as error:
            print(f"jpaged: {error}", file=sys.stderr)


def _act(conversation: Conversation, question: str) -> None:
    if question == "/new":
        conversation.clear()
    elif question == "/undo":
        conversation.undo()
    elif question == "/help":
        print(HELP, file=sys.stderr, end="")
    elif question.strip():
        conversation.answer(question)


def _params(llm: LLM, args: argparse.Namespace) -> SamplingParams:
    """Return the parameters of answers: the flags, over the model's own defaults."""
    given: dict[str, Any] = flags.given_parameters(args)
    for name in ("n", "beam_width", "length_penalty", "logprobs"):
        if name in given:
            raise ValueError(f"--{name}: expected none in a chat, got {given[name]}")
    params = llm.get_default_sampling_params()
    params.max_tokens = MAX_TOKENS
    for name, value in given.items():
        setattr(params, name, value)
    return params


def _read_question() -> str | None:
    """Return the next question; None at the end of stdin."""
    lines = []
    while True:
        prompt = "... " if lines else "> "
        if sys.stdin.isatty():
            _line_editing()
            try:
                line = input(prompt)
            except EOFError:
                print(file=sys.stderr)
                return "\n".join(lines) or None
        else:
            line = sys.stdin.readline()
            if not line:
                return "\n".join(lines) or None
            line = line.removesuffix("\n")
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


def _line_editing() -> None:
    """Let `input` edit lines and remember them, where Python has readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        pass
