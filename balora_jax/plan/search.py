"""Layouts of a step worth compiling: mesh, micro-batches and rematerialisation.

Nothing is compiled here. A layout has a lower bound of its memory, which rules out those that
cannot fit, and an estimate of its speed, which orders the rest.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from balora_jax.config import RunConfig
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.numerics import head
from balora_jax.parallel import sharding
from balora_jax.plan import arguments, compiled, hlo
from balora_jax.plan.hlo_groups import group_over
from balora_jax.plan.targets import Target
from balora_jax.tasks import flops
from balora_jax.tasks.text.program import TextProgram, text_program

REMATS = ("none", "dots", "full")
"""From the most memory and the least work to the reverse; ``offload`` is the user's choice."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One way to lay out a step.

    Attributes:
        sizes: of the mesh axes, in the order of ``sharding.AXES``.
        accumulation: micro-batches.
        remat: policy.
        memory: bytes of a device that it needs at least.
        cost: what orders layouts, smaller first.
    """

    sizes: tuple[int, ...]
    accumulation: int
    remat: str
    memory: int
    cost: tuple[float, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """What ``--set`` would say."""
        axes = zip(sharding.AXES, self.sizes, strict=True)
        return {f"mesh.{axis}": size for axis, size in axes} | {
            "training.accumulation": self.accumulation,
            "model.remat": self.remat,
        }

    def applied(self, config: RunConfig) -> RunConfig:
        """The config with this layout."""
        tree = config.model_dump(mode="json")
        for key, value in self.settings.items():
            section, name = key.split(".")
            tree[section][name] = value
        return parse_config(tree, "--mesh auto")

    def needs_no_less(self, other: "Layout") -> bool:
        """Whether it takes at least the memory of another: same mesh, no smaller, no thriftier."""
        thriftier = REMATS.index(self.remat) > REMATS.index(other.remat)
        same = self.sizes == other.sizes
        return same and self.accumulation <= other.accumulation and not thriftier

    def is_no_faster(self, other: "Layout") -> bool:
        """Whether it does at least the work of another on the same mesh."""
        return other.needs_no_less(self)


def fits(row: Row, target: Target) -> bool | None:
    """Whether a compiled step fits the devices; None where their memory is not known."""
    if row["does_not_fit"] is not None:
        return False
    return None if target.memory is None else row["bytes_per_device"]["total"] <= target.memory


def link_seconds(sent: Mapping[str, int], link: float, network: float | None) -> float:
    """Least seconds of what a device sends: over its links, and over its part of the network.

    Args:
        sent: ``bytes`` of all, and of these ``between_hosts``.
        link: bytes per second over its links.
        network: bytes per second to other hosts; None where hosts are no border.
    """
    inside = sent["bytes"] / link
    return inside if network is None else max(inside, sent["between_hosts"] / network)


class Space:
    """All layouts of a config on a target that can fit, the most promising first.

    Raises:
        InputError: where none can.
    """

    def __init__(self, config: RunConfig, decoder: DecoderConfig, target: Target):
        self.target = target
        one = abstract_mesh((target.devices, *(1 for _ in sharding.AXES[1:])))
        relaxed = _relaxed(config, target.devices)
        self.program = text_program(relaxed, decoder, one)
        self.config = config
        found = [layout for sizes in self._meshes() for layout in self._on(sizes)]
        self.smallest = min((layout.memory for layout in found), default=None)
        limit = math.inf if target.memory is None else target.memory
        self.layouts = sorted(
            (layout for layout in found if layout.memory <= limit), key=lambda one: one.cost
        )
        if not self.layouts:
            raise InputError(self._nothing())

    def _nothing(self) -> str:
        if self.smallest is None:
            return (
                f"--mesh auto: expected a mesh of {self.target.devices} devices that divides the "
                f"model and batch_size {self.config.training.batch_size}, got none. Change the "
                "batch or the devices."
            )
        return (
            f"--mesh auto: expected a layout that fits {self.target.memory} bytes per device of "
            f"{self.target.name}, got at least {self.smallest}. Take more or larger devices."
        )

    def next(self, done: Sequence[tuple[Layout, Row]], most: int) -> Layout | None:
        """The layout to compile next; None where no other can be better.

        What is known to fit makes slower ones on its mesh needless, what is known not to fit
        larger ones. When half of the trials are spent and nothing fits, the smallest come first.
        """
        known = [(layout, fits(row, self.target)) for layout, row in done]
        open_layouts = [
            layout
            for layout in self.layouts
            if not any(
                layout.needs_no_less(other) if ok is False else layout.is_no_faster(other)
                for other, ok in known
            )
        ]
        desperate = 2 * len(done) >= most and all(ok is False for _, ok in known)
        if desperate:
            return min(open_layouts, key=lambda one: one.memory, default=None)
        return next(iter(open_layouts), None)

    def _meshes(self) -> Iterator[tuple[int, ...]]:
        """Sizes whose product is the number of devices.

        ``tensor`` cuts between heads, ``expert`` between experts, ``data`` between slices. Rows are
        cut into ``sequence`` only where the batch has fewer rows than data, fsdp and expert would
        take.
        """
        decoder, devices = self.program.decoder, self.target.devices
        for sizes in _factorizations(devices, len(sharding.AXES)):
            named: dict[str, int] = dict(zip(sharding.AXES, sizes, strict=True))
            if math.gcd(decoder.num_heads, decoder.num_kv_heads) % named.get("tensor", 1):
                continue
            if named.get("data", 1) % self.target.slices:
                continue
            experts = named.get("expert", 1)
            if experts > 1 and (decoder.experts == 0 or decoder.experts % experts):
                continue
            sequence = named.get("sequence", 1)
            scarce = self.config.training.batch_size < devices // named.get("tensor", 1)
            if sequence > 1 and (not scarce or self.config.data.max_length % sequence):
                continue
            yield sizes

    def _on(self, sizes: tuple[int, ...]) -> Iterator[Layout]:
        """Layouts on one mesh; none where the model does not divide over it."""
        mesh = abstract_mesh(sizes)
        program = dataclasses.replace(self.program, mesh=mesh)
        try:
            held = sum(compiled.held_bytes(arguments.abstract_arguments(program, 10)).values())
        except InputError:
            return
        batch = self.config.training.batch_size
        rows = sharding.row_parts(mesh)
        for accumulation in range(1, batch + 1):
            if batch % accumulation or batch // accumulation % rows:
                continue
            for remat in REMATS:
                part = Estimate(program, self.config, self.target, accumulation, remat)
                memory = held + part.working_bytes
                yield Layout(sizes, accumulation, remat, int(memory), part.cost)


def _relaxed(config: RunConfig, devices: int) -> RunConfig:
    """A batch that divides over any mesh of so many devices: only shapes of weights are asked."""
    tree = config.model_dump(mode="json")
    tree["training"] |= {"batch_size": devices, "accumulation": 1}
    tree["model"]["remat"] = "full"
    return parse_config(tree, "--mesh auto")


def abstract_mesh(sizes: Sequence[int]) -> sharding.AnyMesh:
    """A mesh without devices, enough for shapes and shardings."""
    auto = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
    mesh = jax.sharding.AbstractMesh(tuple(sizes), sharding.AXES, axis_types=auto)
    return cast(sharding.AnyMesh, mesh)


def _factorizations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorizations(number // first, parts - 1):
                yield (first, *rest)


@dataclass(frozen=True)
class Estimate:
    """Estimate, by hand, of what a layout needs beside the arrays it is given.

    Attributes:
        program: the model on the mesh.
        config: of the run.
        target: the devices.
        accumulation: micro-batches.
        remat: policy.
    """

    program: TextProgram
    config: RunConfig
    target: Target
    accumulation: int
    remat: str

    @property
    def item(self) -> int:
        """Bytes of a number of the activations."""
        return jnp.dtype(self.config.model.dtype).itemsize

    def size(self, axis: str) -> int:
        """Devices along an axis; 1 where there is no such axis."""
        return self.program.mesh.shape.get(axis, 1)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch on one device."""
        rows = self.config.training.batch_size // self.accumulation
        return rows // sharding.row_parts(self.program.mesh)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self.rows * self.config.data.max_length // self.size("sequence")

    def spread(self, shapes: Mapping[str, jax.ShapeDtypeStruct], *paths: str) -> float:
        """Numbers of arrays that a device has where only experts are spread."""
        sizes = (
            shapes[path].size / (self.size("expert") if ".experts." in path else 1)
            for path in paths
        )
        return sum(sizes)

    @property
    def saved_bytes(self) -> float:
        """Least that the student's forward leaves for the backward, by remat."""
        decoder, tensor = self.program.decoder, self.size("tensor")
        per_token: float = decoder.hidden_size
        if self.remat != "full":
            heads = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim
            per_token += (heads + 2 * decoder.intermediate_size) / tensor
        if self.remat == "none":
            per_token += decoder.num_heads / tensor * self.config.data.max_length
        return decoder.num_layers * self.tokens * per_token * self.item

    @property
    def working_bytes(self) -> float:
        """Least temporaries: what is saved, gradients, and the larger of a layer and the head."""
        tensor, gathered = self.size("tensor"), self.size("fsdp") > 1
        frozen = self.program.plain.frozen
        stacks = (self.spread(frozen, path) for path in frozen if path.startswith("layers."))
        layer = max(stacks) / self.program.decoder.num_layers / tensor * self.item
        table = self.program.decoder.vocab_size / tensor
        fused = self.config.training.head == "fused"
        # Two arrays of logits, values and gradient, without chunks; at least 64 rows with them.
        chunk = min(self.tokens, 64) if fused else 2 * self.tokens
        width = self.program.decoder.hidden_size
        last = table * (chunk * 4 + (width * self.item if gathered else 0))
        layout = self.program.layout.attached(self.program.student.adapters)
        gradients = compiled.local_bytes(layout)
        return self.saved_bytes + gradients + max(last, layer if gathered else 0)

    @property
    def cost(self) -> tuple[float, ...]:
        """Estimated seconds, the slowest part and then the sum; bare numbers for unknown speeds."""
        shape = (1, self.config.training.batch_size, self.config.data.max_length)
        work = flops.model_flops(self.program, shape, compiled.counted_tokens(shape))
        work += flops.recomputed_flops(self.program, shape, self.remat)
        work /= self.program.mesh.size
        memory, sent = self.traffic, self.sent
        target = self.target
        if target.peak is None or target.bandwidth is None or target.link is None:
            return work, sent["bytes"], memory
        links = link_seconds(sent, target.link, target.network)
        seconds = (work / target.peak, memory / target.bandwidth, links)
        return max(seconds), sum(seconds)

    @property
    def _passes(self) -> int:
        """Times that a micro-batch needs the weights: teacher, forward, backward."""
        program = self.program
        return 2 + (program.objective.needs_teacher and not program.keeps_teacher)

    @property
    def traffic(self) -> float:
        """Bytes that a device reads and writes at least: weights, and what the backward needs."""
        plain = self.program.plain.parameters
        weights = self.spread(plain, *plain) * self.item / self.size("tensor")
        passes = self._passes + (self.remat == "full")
        return self.accumulation * (passes * weights + 2 * self.saved_bytes)

    @property
    def sent(self) -> dict[str, int]:
        """Bytes of gathered weights, keys and values, summed activations and summed gradients."""
        decoder, tensor, experts = self.program.decoder, self.size("tensor"), self.size("expert")
        plain = self.program.plain.parameters
        passes = self._passes + (self.remat == "full")
        weights = self.spread(plain, *plain) * self.item / tensor
        width = decoder.num_layers * self.tokens * decoder.hidden_size
        heads = 2 * decoder.num_kv_heads * decoder.head_dim / tensor
        values = heads * decoder.num_layers * self.tokens * self.item
        gradients = 4 * self.program.trainable / tensor
        found = [
            self._exchange("all-gather", passes * weights / self.size("fsdp"), "fsdp"),
            self._exchange("all-reduce", 2 * passes * width * self.item, "tensor"),
            self._exchange("all-gather", passes * values, "sequence"),
            self._exchange("all-reduce", gradients, "data", "fsdp", "expert", "sequence"),
        ]
        if experts > 1:
            # Rows of all gathered, and what experts add to them summed, both in float32.
            found.append(self._exchange("all-gather", 3 * passes * width * 4, "expert"))
        return hlo.total(found)

    def _exchange(self, kind: str, size: float, *axes: str) -> hlo.Collective:
        """What a device sends in a step, of operands of so many bytes over mesh axes."""
        group = group_over(self.program.mesh.shape, axes, self.target.borders)
        size = int(self.accumulation * size)
        whole, between = (
            hlo.ring_bytes(kind, size, group.size),
            hlo.network_bytes(kind, size, group),
        )
        return hlo.Collective(kind, axes, self.accumulation, whole, between)


def least_moved(row: Row, config: RunConfig, target: Target) -> Row:
    """``traffic`` and ``sent`` of a compiled row, as :class:`Estimate` counts them."""
    if row["traffic"] is None:
        return {}
    decoder = arguments.opened_base(config.model).config
    program = text_program(config, decoder, abstract_mesh(tuple(row["mesh"].values())))
    least = Estimate(program, config, target, row["accumulation"], row["remat"])
    return {"traffic": int(least.traffic), "sent": least.sent}


def default_head_memory(config: RunConfig, target: Target) -> RunConfig:
    """The config with the head's memory of the target, where another platform compiles for it."""
    if config.training.head_memory_mib is not None or target.platform != "gpu":
        return config
    tree = config.model_dump(mode="json")
    tree["training"]["head_memory_mib"] = head.default_memory_mib(target.platform)
    return parse_config(tree, "plan")
