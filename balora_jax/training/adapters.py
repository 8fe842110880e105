"""The adapters of a run: which layers get one, where they begin, and what trains at step 0."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array
from balora_jax.config import AdapterConfig, ModelConfig
from balora_jax.errors import InputError
from balora_jax.io.peft_reader import read_peft
from balora_jax.models.adapters import (
    AdaptedModule,
    AdapterShape,
    adapter_shapes,
    plan_adapters,
    trainable_parameters,
)
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import family_of, weight_rules
from balora_jax.models.methods import METHODS
from balora_jax.models.methods.method import Method
from balora_jax.models.quantized import floating_kernels
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import Moments, Stacks, start_adapters
from balora_jax.models.starts.start import Start
from balora_jax.models.structure import Structure, size_of
from balora_jax.models.weight_names import WeightRule, linear_shapes
from balora_jax.models.whole import NOTHING, Config, Whole, begun, whole_of
from balora_jax.parallel import hosts
from balora_jax.parallel.sharding import Layout
from balora_jax.paths import resolve_path
from balora_jax.pretrained.peft_start import PeftStart
from balora_jax.pretrained.peft_whole import check_tables, check_vocabulary, saved_whole
from balora_jax.progress import progress_bar

Arrays = dict[str, Array]

_NAMED_BY_PEFT = ("classifier", "score")
"""What PEFT adds to ``modules_to_save`` for classes, whatever the model calls its head."""


def start_of(name: str) -> Start | PeftStart:
    """The start that ``adapter.start`` names; a folder only where no start has this name.

    Raises:
        InputError: neither a start nor a folder, or a folder that holds no usable adapter.
    """
    if name not in STARTS and Path(folder := resolve_path(name)).is_dir():
        return PeftStart(folder, read_peft(folder))
    return STARTS[name]


@dataclass(frozen=True)
class Adapters:
    """The adapters that a run trains.

    Attributes:
        method: what trains in them.
        start: where they begin.
        modules: the adapted layers; none for a full fine-tuning.
        dropout: on their input.
        use_rslora: the scales are alpha / √rank.
        whole: weights that train whole beside them.
        beside: tables that the start's folder holds and none of its modules names: the base's own.
    """

    method: Method
    start: Start | PeftStart
    modules: tuple[AdaptedModule, ...]
    dropout: float
    use_rslora: bool
    whole: Whole = NOTHING
    beside: tuple[WeightRule, ...] = ()

    @property
    def leaves_base(self) -> bool:
        """Whether the model as it starts to train is another than the base."""
        return isinstance(self.start, PeftStart)

    @property
    def shapes(self) -> dict[str, AdapterShape]:
        """What the stacked layers must know of their adapters."""
        return adapter_shapes(self.modules, origin=self.start.has_origin, dropout=self.dropout)

    def trainable(self, plain: Structure) -> int:
        """Trainable parameters, from the shapes of the base; padding of stacks is not counted."""
        if self.method.trains_base:
            return size_of(plain.parameters)
        return trainable_parameters(self.modules) + size_of(self.whole.shapes(plain.parameters))

    def trains_head(self, config: DecoderConfig) -> bool:
        """Whether the table that scores the vocabulary trains."""
        return self.method.trains_base or self.whole.trains_head(config)

    def begin(
        self,
        frozen: Arrays,
        model: ModelConfig,
        layout: Layout,
        *,
        seed: int,
        moments: Moments | None = None,
        report: Callable[[Stacks], None] | None = None,
    ) -> tuple[Arrays, Arrays]:
        """What trains at step 0, and the origin it is measured from, each array on its devices.

        Args:
            frozen: the base's weights as they are held.
            model: how they are held.
            layout: where everything lies.
            seed: of the start's key.
            moments: of the inputs of the layers, for a start that reads rows.
            report: called after each layer of a named start; a bar where it is not given.

        Raises:
            InputError: a start that brings a table other than the base's, which nothing trains.
        """
        if self.method.trains_base:
            # Copies even in float32: the step is given these arrays for good.
            copies = {path: jnp.array(value, jnp.float32) for path, value in frozen.items()}
            return layout.placed(copies), {}
        kernels = kernels_of(frozen, model)
        if isinstance(self.start, PeftStart):
            check_tables(self.start, self.beside, frozen)
            adapters, origin = self.start.begin(self.modules, kernels, layout)
        else:
            with layer_bar(len(self.modules)) as moved:
                adapters, origin = start_adapters(
                    self.modules,
                    kernels,
                    start=self.start,
                    key=jax.random.key(seed),
                    layout=layout,
                    moments=moments,
                    report=report or moved,
                )
        # Copies, as above; and DoRA's norms are not yet where the table wants them.
        kept = begun(self.whole, self.start.saved, frozen)
        adapters |= {path: jnp.array(value, jnp.float32) for path, value in kept.items()}
        return layout.placed(adapters), layout.placed(origin)


def adapters_of(config: AdapterConfig, base: Config, plain: Structure) -> Adapters:
    """The adapters that a config asks for on a model, and what trains whole beside them.

    Args:
        config: the section ``adapter``.
        base: config of the base.
        plain: its shapes.

    Raises:
        InputError: an unknown start, targets that match no layer, a rank that does not fit, or a
            module to save that there is not.
    """
    start, method = start_of(config.start), METHODS[config.method]
    names, tokens = config.modules_to_save, config.trainable_token_indices
    if method.trains_base:
        return Adapters(method, start, (), 0.0, use_rslora=False)
    rules, frozen = weight_rules(base), plain.parameters
    linears = linear_shapes(rules, frozen)
    if isinstance(start, PeftStart):
        modules = start.modules(linears)
        found, saved = saved_whole(start.peft, base, frozen, start.folder)
        check_vocabulary(found, base, start.folder)
        head = family_of(base).head_modules()
        others = (*head, *names, *(_NAMED_BY_PEFT if head else ()))
        mine = [name for name in saved.names if name not in others]
        whole = whole_of((*names, *mine), start.peft.tokens or tokens, base, rules, frozen)
        method, rslora = start.peft.method, start.use_rslora
        beside = tuple(rule for rule in saved.rules if rule.path not in whole.paths)
        return Adapters(method, start, modules, config.dropout, rslora, whole, beside)
    whole = whole_of(names, tokens, base, rules, frozen)
    modules = plan_adapters(
        linears,
        rank=config.rank,
        alpha=config.rank if config.alpha is None else config.alpha,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.use_rslora,
        method=method,
    )
    start.check_ranks(modules)
    return Adapters(method, start, modules, config.dropout, config.use_rslora, whole)


@contextmanager
def layer_bar(layers: int) -> Iterator[Callable[[Stacks], None]]:
    """A bar that moves on by a layer, shown where it takes long: its rate is the time of one."""
    quiet = not hosts.is_first()
    with progress_bar(total=layers, desc="start", unit="layer", delay=5, disable=quiet) as bar:

        def report(stacks: Stacks) -> None:
            jax.block_until_ready(stacks)
            bar.update()

        yield report


def kernels_of(frozen: Arrays, config: ModelConfig) -> Mapping[str, Array]:
    """The frozen weights in floating point, dequantised one stack at a time when looked up."""
    return floating_kernels(frozen, config.quantization, config.dtype)


def check_base(adapter: AdapterConfig, model: ModelConfig) -> None:
    """Raises InputError where the weights themselves are to train and cannot."""
    if METHODS[adapter.method].trains_base and model.quantization != "none":
        raise InputError(
            f"model.quantization: expected none with adapter.method {adapter.method}, got "
            f"{model.quantization}: codes cannot be trained. Set it to none."
        )
