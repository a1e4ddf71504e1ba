"""Engine configs that compile quickly, and a way to compile them quickly."""

import dataclasses

from jpaged.config import EngineConfig

# Compiler options of programs that run for milliseconds.
QUICKLY = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class OneSizeConfig(EngineConfig):
    """A config with one size of decode steps and one of steps with prompt chunks.

    Each size is a copy of the decoder in the program, so this one compiles in a
    fraction of the time. For tests that are not about sizes.
    """

    @property
    def row_buckets(self) -> tuple[int, ...]:
        return (self.max_num_seqs,)

    @property
    def token_buckets(self) -> tuple[int, ...]:
        return (self.max_num_batched_tokens,)


def one_size(config: EngineConfig) -> OneSizeConfig:
    """The same config with one size of each kind of step."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return OneSizeConfig(**fields)
