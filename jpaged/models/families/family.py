"""Family: the record that describes one architecture, and the tensors it implies.

Pipeline: config.json, tensor names -> [models.families] -> ModelConfig, parameters.

Each other module of this folder holds the records of one line of models. A record is
all that the package knows about an architecture; the decoder sees only a ModelConfig.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Fields = Mapping[str, Any]  # fields of a ModelConfig by name; rope_scaling as a dict

# Location of a parameter in the decoder: attribute names and list indices.
Path = tuple[str | int, ...]


class Tensor(NamedTuple):
    """One tensor of a checkpoint, and the parameters that it holds.

    If it holds several parameters, they are concatenated along the last axis (after
    `transposed`), or interleaved along it element by element.
    """

    name: str
    paths: tuple[Path, ...]
    transposed: bool = (
        False  # stored as [..., out, in]; the parameter is [..., in, out]
    )
    interleaved: bool = False
    expert: int | None = None  # the tensor holds this expert's part of the parameter
    by_head: bool = False  # rows of all parameters [heads, rows, in], head after head


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face: its config.json, its tensors, its common sizes.

    Attributes:
      architecture: class name in config.json, such as "LlamaForCausalLM".
      model_type: `model_type` in config.json.
      read: config.json -> fields of a ModelConfig.
      write: fields of a ModelConfig -> the entries of config.json that `read` reads.
      layer_modules: modules inside a layer, decoder name -> checkpoint name. A key with
        spaces names several decoder modules that share one stored tensor.
      modules: the same outside the layers.
      prefix: start of every tensor name; checkpoints of the bare model omit it.
      layer_prefix: start of the names inside a layer, before the layer's index.
      embedding: name of the embedding's tensor.
      router: name of the experts' router.
      experts: expert modules, decoder name -> checkpoint name with "{expert}". With
        `stacks_experts`, each name is one tensor [X, in, out] of all experts, and a key
        with spaces names modules whose columns are interleaved in it.
      stacks_experts: whether one tensor holds all experts.
      stores_in_out: whether weights are stored as [in, out] (GPT-2).
      ignored: ends of the names of stored tensors that repeat config.json.
      has_extra_layers: whether checkpoints may have layers after the last one that
        predict further tokens; they are not loaded.
      defaults: values of config.json entries that may be missing, as in the
        transformers class.
      sizes: config.json of common models by name, for "random:NAME". `model_type`
        may be omitted.
    """

    architecture: str
    model_type: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Fields], dict[str, Any]]
    layer_modules: Mapping[str, str]
    modules: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"final_norm": "model.norm"}
    )
    prefix: str = "model."
    layer_prefix: str = "model.layers."
    embedding: str = "model.embed_tokens.weight"
    router: str = ""
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stacks_experts: bool = False
    stores_in_out: bool = False
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    has_extra_layers: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def tensors(
        self, *, num_layers: int, num_experts: int, is_tied: bool, vocab_first: bool
    ) -> Iterator[Tensor]:
        """Every tensor that a checkpoint of this architecture can contain.

        Includes biases, projections and experts, whether or not a given decoder has
        them.
        """
        if not is_tied:
            yield Tensor(self.embedding, (("embedding",),))
        # A tied model has one array for both uses, in the layout of the output product.
        name = self.embedding if is_tied else "lm_head.weight"
        weights: Path = ("output", "rows" if vocab_first else "weight")
        yield Tensor(name, (weights,), transposed=not vocab_first)
        for modules, name in self.modules.items():
            yield from self._module_tensors((), modules, name)
        for layer in range(num_layers):
            top, prefix = ("layers", layer), f"{self.layer_prefix}{layer}."
            for modules, name in self.layer_modules.items():
                yield from self._module_tensors(top, modules, prefix + name)
            if num_experts:
                yield from self._expert_tensors((*top, "experts"), prefix, num_experts)

    def _module_tensors(self, top: Path, modules: str, name: str) -> Iterator[Tensor]:
        """Tensors of one checkpoint module, which may be several decoder modules."""
        paths: list[Path] = [(*top, *path.split(".")) for path in modules.split()]
        last = str(paths[0][-1])
        if last in ("sinks", "correction"):
            yield Tensor(name, tuple(paths))
            return
        if last == "key_up":
            yield Tensor(f"{name}.weight", tuple(paths), by_head=True)
            return
        is_table = last == "position_embedding"
        transposed = not (is_table or last.endswith("norm") or self.stores_in_out)
        weights = paths if is_table else [(*path, "weight") for path in paths]
        yield Tensor(f"{name}.weight", tuple(weights), transposed)
        if not is_table:
            yield Tensor(f"{name}.bias", tuple((*path, "bias") for path in paths))

    def _expert_tensors(self, top: Path, prefix: str, count: int) -> Iterator[Tensor]:
        yield from self._module_tensors(top, "router", prefix + self.router)
        for modules, name in self.experts.items():
            paths = [(*top, module) for module in modules.split()]
            weights = tuple((*path, "weight") for path in paths)
            if self.stacks_experts:
                biases = tuple((*path, "bias") for path in paths)
                interleaved = len(paths) > 1
                yield Tensor(prefix + name, weights, interleaved=interleaved)
                yield Tensor(f"{prefix}{name}_bias", biases, interleaved=interleaved)
                continue
            for expert in range(count):
                stored = f"{prefix}{name.format(expert=expert)}.weight"
                yield Tensor(stored, weights, transposed=True, expert=expert)
