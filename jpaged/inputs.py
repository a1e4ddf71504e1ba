"""vLLM's name of the module of prompt types; see `jpaged.prompts`."""

from jpaged.prompts import PromptType as PromptType
from jpaged.prompts import TextPrompt as TextPrompt
from jpaged.prompts import TokensPrompt as TokensPrompt
