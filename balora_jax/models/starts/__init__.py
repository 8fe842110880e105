"""Starts of adapters: one a file, each an object under its name in ``STARTS``.

``start.py`` says what a start is; ``stacks.py`` writes its factors into the stacks of a model.
"""

import difflib

from balora_jax.errors import InputError
from balora_jax.models.starts.lora import Lora
from balora_jax.models.starts.milora import Milora
from balora_jax.models.starts.olora import Olora
from balora_jax.models.starts.orthogonal import Orthogonal
from balora_jax.models.starts.pissa import Pissa, SketchedPissa
from balora_jax.models.starts.start import Start
from balora_jax.registry import Registry


class Starts(Registry[Start]):
    """Starts by name; a name may hold a number, as ``pissa_niter_16`` does.

    Example:
        >>> STARTS["pissa_niter_16"].name, "pissa_niter_x" in STARTS
        ('pissa_niter_16', False)
    """

    def _found(self, name: object) -> Start | None:
        found = (start.named(name) for start in self.values() if isinstance(name, str))
        return next((start for start in found if start is not None), None)

    def __contains__(self, name: object) -> bool:
        """Whether there is a start of this name."""
        return self._found(name) is not None

    def __getitem__(self, name: str) -> Start:
        """The start of this name.

        Raises:
            InputError: There is none; the message lists those there are.
        """
        found = self._found(name)
        if found is not None:
            return found
        near = difflib.get_close_matches(name, list(self), n=1)
        advice = f"Did you mean {near[0]!r}?" if near else "Choose one of these."
        if name in near:  # the pattern itself
            advice = "Write a number in place of its last letter."
        raise InputError(
            f"{self.where}: expected {', '.join(map(repr, self))} or the folder of a PEFT adapter, "
            f"got {name!r}. {advice}"
        )


STARTS = Starts("start", "adapter.start")
for _start in (Lora(), Pissa(), SketchedPissa(), Milora(), Olora(), Orthogonal()):
    STARTS.register(_start)
