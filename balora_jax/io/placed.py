"""The tensors of an open checkpoint under the names of a weight-name table."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from balora_jax.io.hf_files import StoredTensor, Window
from balora_jax.models.weight_names import WeightRule, stored_names

# What transformers 5 calls all experts of a layer in one tensor, and their router.
_FUSED = re.compile(r"(?:.*\.)?layers\.(\d+)\.mlp\.(experts\.gate_up_proj|experts\.down_proj)")
_ROUTER = re.compile(r"(?:.*\.)?layers\.(\d+)\.mlp\.gate\.weight")
_BLOCK = "layers.block_sparse_moe"
_GATE, _DOWN, _UP = (f"{_BLOCK}.experts.{name}.kernel" for name in ("w1", "w2", "w3"))


def placed(
    stored: Mapping[str, StoredTensor], rules: Sequence[WeightRule]
) -> dict[str, StoredTensor]:
    """Every tensor by the name that the table uses; experts in one tensor become one each.

    Args:
        stored: tensors by the names in the files.
        rules: the table. A tensor that it does not name keeps its own name.
    """
    named = {ours: stored[name] for ours, name in stored_names(stored, rules).items()}
    table = {rule.path: rule.name for rule in rules}
    if _GATE not in table:
        return named
    found: dict[str, StoredTensor] = {}
    for name, tensor in named.items():
        router = _ROUTER.fullmatch(name)
        if router:
            name = table[f"{_BLOCK}.gate.weight"].format(i=router[1])
        found |= dict(_experts(name, tensor, table))
    return found


def _experts(
    name: str, tensor: StoredTensor, table: Mapping[str, str]
) -> Iterator[tuple[str, StoredTensor]]:
    """The matrices of a fused tensor; of another the tensor itself.

    ``gate_up_proj`` is [experts, 2 F, D], of each expert the gate's rows before the others;
    ``down_proj`` is [experts, D, F].
    """
    fused = _FUSED.fullmatch(name)
    paths = (_GATE, _UP) if name.endswith("gate_up_proj") else (_DOWN,)
    if not fused or len(tensor.shape) != 3 or tensor.shape[1] % len(paths):
        yield name, tensor
        return
    experts, rows, columns = tensor.shape
    rows //= len(paths)
    for expert in range(experts):
        for half, path in enumerate(paths):
            part = replace(tensor, shape=(rows, columns), window=Window(expert, half * rows))
            yield table[path].format(i=fused[1], e=expert), part
