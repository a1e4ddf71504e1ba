"""Arguments of the engine from a command line, and parameters that are set later."""

import json

from jpaged import LLM, EngineArgs, TextPrompt, TokensPrompt
from jpaged.utils.argparse_utils import FlexibleArgumentParser


def main(args: dict) -> None:
    """Generate with the model's default parameters, changed by the arguments."""
    max_tokens = args.pop("max_tokens")
    llm = LLM(**args)
    sampling_params = llm.get_default_sampling_params()
    sampling_params.max_tokens = max_tokens
    sampling_params.temperature = 0.0
    sampling_params.logprobs = 1
    ids = llm.get_tokenizer().encode("def area(")
    prompts = [TokensPrompt(prompt_token_ids=ids), TextPrompt(prompt="def area(")]
    first, second = llm.generate(prompts, sampling_params=sampling_params)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert len(first.outputs[0].logprobs) == len(first.outputs[0].token_ids)
    print(json.dumps({"finish_reasons": [first.outputs[0].finish_reason]}))


if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser.add_argument_group("Engine arguments"))
    parser.set_defaults(model="tiny-python", max_num_seqs=2)
    parser.add_argument("--max-tokens", type=int)
    main(vars(parser.parse_args(["--max_tokens", "6", "--max_model_len=64"])))
