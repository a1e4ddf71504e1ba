"""vLLM's newer name of the module of its argument parser."""

from jpaged.engine_args import FlexibleArgumentParser as FlexibleArgumentParser
