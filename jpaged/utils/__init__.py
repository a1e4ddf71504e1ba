"""vLLM's name of the module of its argument parser; see `jpaged.engine_args`."""

from jpaged.engine_args import FlexibleArgumentParser as FlexibleArgumentParser
