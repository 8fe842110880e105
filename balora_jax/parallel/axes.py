"""The one table of the mesh axes that rows, tokens and weights are split over."""

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""Axes of every mesh. Devices side by side on the last one exchange most."""

ROWS = ("data", "fsdp", "expert")
"""Over which the rows of a batch are split."""

TOKENS = "sequence"
"""Over which the tokens of a row are split."""

EXPERTS = "expert"
"""Over which the experts of every layer are split."""

VOCABULARY = "tensor"
"""Over which the entries of the head are split."""

WEIGHTS = ("fsdp", TOKENS)
"""Over which the width of a weight is split: devices that share a row share its weights too."""

MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,  # scanned over, so every device needs every layer
    "experts": EXPERTS,  # of all layers, in the order of ``DecoderConfig.expert_groups``
    "vocabulary": VOCABULARY,
    "heads": "tensor",
    "inner": "tensor",
    "width": WEIGHTS,
    # A factor of an adapter has one long axis, so that one takes all mesh axes: else half of the
    # adapters, and of the optimizer's moments, would lie whole on every device.
    "adapter_heads": ("tensor", *WEIGHTS),
    "adapter_inner": ("tensor", *WEIGHTS),
    "adapter_width": WEIGHTS,
}
"""Logical axis of an array → the mesh axes over which it is split."""
