"""All bad inputs."""

import functools
import zlib
from collections.abc import Mapping
from types import ModuleType

from tests.bad_inputs import (
    checkpoints,
    command_lines,
    config_fields,
    config_files,
    data_files,
    model_configs,
    tokenizers,
    weights,
    workdirs,
)
from tests.bad_inputs.case import Case

GROUPS: tuple[ModuleType, ...] = (
    checkpoints,
    command_lines,
    config_fields,
    config_files,
    data_files,
    model_configs,
    tokenizers,
    weights,
    workdirs,
)


@functools.cache
def by_name() -> Mapping[str, Case]:
    """Every case; no two have one name."""
    found: dict[str, Case] = {}
    for group in GROUPS:
        for case in group.cases():
            assert case.name not in found, f"two cases {case.name}"
            found[case.name] = case
    return found


def in_the_sixth(name: str) -> bool:
    """Whether a case is one of those that the default tests run."""
    return zlib.crc32(name.encode()) % 6 == 0
