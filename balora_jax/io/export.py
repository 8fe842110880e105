"""A finished run to files that other tools read: a PEFT adapter or a merged checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balora_jax.array_types import Array
from balora_jax.config import RunConfig
from balora_jax.errors import InputError
from balora_jax.io.hf_export import export_merged, module_deltas
from balora_jax.io.peft_adapter import ExportReport, export_peft, read_peft
from balora_jax.io.pretrained import Base, host_copy, open_base, peft_modules
from balora_jax.models.adapters import AdaptedModule
from balora_jax.models.decoder import structure
from balora_jax.models.registry import linear_shapes
from balora_jax.models.starts import start_from_factors
from balora_jax.paths import PACKAGE_PREFIX


def write_adapter(
    folder: Path,
    base: Base,
    name_or_path: str,
    modules: tuple[AdaptedModule, ...],
    adapters: Mapping[str, Array],
    origin: Mapping[str, Array],
    *,
    use_rslora: bool,
    rank: int | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write adapters as a PEFT folder on the original base."""
    linears = linear_shapes(base.config, structure(base.config).frozen)
    packaged = name_or_path.startswith(PACKAGE_PREFIX)
    return export_peft(
        folder,
        modules=modules,
        adapters=host_copy(adapters),
        origin=host_copy({path: value for path, value in origin.items() if ".origin_" in path}),
        # Other tools know nothing of paths inside this package.
        base_name=str(base.folder) if packaged else name_or_path,
        rank=rank,
        use_rslora=use_rslora,
        base_modules=[name for shape in linears for name in shape.names],
        overwrite=overwrite,
    )


def export_run(
    config: RunConfig, workdir: Path, out: Path, *, format: str, rank: int | None
) -> dict[str, Any]:
    """Export the adapter of a finished run; returns figures for the report.

    Args:
        config: of the run; names the base.
        workdir: its folder.
        out: new folder.
        format: ``peft`` or ``merged``.
        rank: recompress every adapter to this rank by SVD (``peft`` only).

    Raises:
        InputError: no finished adapter there, or an output folder that cannot be written.
    """
    source = workdir / "adapter"
    if not source.is_dir():
        raise InputError(
            f"{workdir}: expected the folder of a finished run with adapter/ in it, got none. "
            "Finish the run (balora train … --resume), or name its --workdir."
        )
    if rank is not None and format == "merged":
        raise InputError("--rank: expected --format peft, got merged. Leave one of them out.")
    base = open_base(config.model.name_or_path, config.model.revision)
    shapes = structure(base.config).frozen
    peft = read_peft(source)
    modules = peft_modules(peft, linear_shapes(base.config, shapes), str(source))
    adapters, _ = start_from_factors(modules, shapes, peft.tensors)
    if format == "merged":
        deltas = module_deltas(modules, host_copy(adapters), {})
        merged = export_merged(out, source=base.folder, deltas=deltas, dtype=config.model.dtype)
        return {
            "folder": str(out),
            "format": format,
            "dtype": config.model.dtype,
            "files": merged.files,
            "merged_weights": merged.merged,
        }
    report = write_adapter(
        out, base, config.model.name_or_path, modules, adapters, {},
        use_rslora=bool(peft.config.get("use_rslora")), rank=rank,
    )  # fmt: skip
    return {
        "folder": str(out),
        "format": format,
        "rank": report.rank,
        "parameters": report.parameters,
        "relative_error": report.error,
    }
