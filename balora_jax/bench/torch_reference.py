"""The same training step in torch, as a user of transformers and peft would write it.

Two full models (the student with PEFT adapters, the frozen teacher), all logits of both on the
rows that count, and the three terms of the paper. Not imported by the package: ``balora bench
--against torch`` runs this file in a process of its own (torch comes with the extra ``test``),
gives it a folder with weights, batch and adapter factors, and asks for one step at a time.

Protocol: ``python torch_reference.py SPEC.json`` prints a JSON line when it is ready, then one for
every line ``step`` on standard input, until ``quit``.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

IGNORED = -100
# Settings of what some models do to their logits.
AFTER_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def main(arguments: list[str]) -> int:
    """Load what the spec names and answer steps; 0 when done, 2 for a spec that cannot be used."""
    try:
        spec = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
        import peft
        import torch
        import transformers
    except (IndexError, OSError, ValueError, ImportError) as error:
        print(f"torch_reference: expected SPEC.json and torch with peft, got {error}.",
              file=sys.stderr)  # fmt: skip
        return 2
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    began = time.perf_counter()
    try:
        torch.set_num_threads(spec["threads"])
        with contextlib.redirect_stdout(sys.stderr):
            trainer = Trainer(spec)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        print(f"torch_reference: expected a spec that can be set up, got {reason}.",
              file=sys.stderr)  # fmt: skip
        return 2
    path, rate = mkl_path(), product_rate(spec["dtype"], trainer.device)
    resident = start_of_memory(trainer)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    say(ready=True, setup_seconds=time.perf_counter() - began, rss=resident, versions=versions,
        mkl=path, asked=bool(spec["fast_path"]), product_rate=rate,
        trainable_parameters=sum(p.numel() for p in trainer.parameters))  # fmt: skip
    for line in sys.stdin:
        if line.strip() != "step":
            break
        with contextlib.redirect_stdout(sys.stderr):
            found = trainer.step()
        peak = memory("VmHWM")
        growth = None if peak is None or resident is None else peak - resident
        say(**found, rss_growth=growth, device_peak=trainer.device_peak())
    return 0


def say(**values: Any) -> None:
    """One JSON line."""
    print(json.dumps(values), flush=True)


def memory(key: str) -> int | None:
    """``VmRSS`` or ``VmHWM`` of this process in bytes; None where the system does not tell."""
    file = Path("/proc/self/status")
    if not file.is_file():
        return None
    for line in file.read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None


def start_of_memory(trainer: "Trainer") -> int | None:
    """Resident bytes with every weight read once (they are mapped from files), peak reset."""
    for model in filter(None, (trainer.student, trainer.teacher)):
        for parameter in model.parameters():
            parameter.sum()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return memory("VmRSS")


def mkl_path() -> str | None:
    """The processors that MKL takes this one for, which decides its kernels; None without MKL.

    It says so on standard output alone, before the first product.
    """
    import torch

    if not torch.backends.mkl.is_available():
        return None
    flush = ctypes.CDLL(None).fflush
    kept = os.dup(1)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 1)
        try:
            with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
                torch.mm(torch.ones(8, 8), torch.ones(8, 8))
            flush(None)
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        said.seek(0)
        text = said.read().decode(errors="replace")
    found = re.search(r" architecture (.*?) processors", text)
    return found and found[1].replace("(R)", "")


def product_rate(dtype: str, device: Any) -> float:
    """Operations per second of a large product, the best of several."""
    import torch

    size = 2048 if device.type == "cpu" else 8192
    square = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(6):
        wait()
        began = time.perf_counter()
        torch.mm(square, square)
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


class Trainer:
    """Models, adapters, optimizer and the batches."""

    def __init__(self, spec: dict[str, Any]):
        import numpy as np
        import torch

        unknown = set(spec["terms"]) - set(TERMS)
        if unknown:
            raise ValueError(f"no reference for the terms {', '.join(sorted(unknown))}")
        self.spec, self.device = spec, torch.device(spec["device"])
        torch.manual_seed(0)  # of the randomized decomposition
        self.student = self.load_student()
        self.teacher = self.load_base().eval() if spec["teacher"] else None
        self.batches = itertools.cycle([self.batch(np.load(file)) for file in spec["batches"]])
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=spec["learning_rate"], betas=tuple(spec["betas"]),
            eps=spec["epsilon"], weight_decay=spec["weight_decay"],
        )  # fmt: skip

    def batch(self, arrays: Any) -> dict[str, Any]:
        """A batch cut to its longest row, with the labels of the positions that count."""
        import torch

        longest = int((arrays["segment_ids"] > 0).sum(-1).max())
        cut = {name: torch.tensor(arrays[name][:, :longest], device=self.device)
               for name in ("input_ids", "segment_ids", "loss_mask")}  # fmt: skip
        ids, segments = cut["input_ids"].long(), cut["segment_ids"]
        if segments.max() > 1:  # a padding mask cannot keep packed examples apart
            raise ValueError("rows with several segments; switch packing off")
        labels = torch.where(cut["loss_mask"] > 0, ids, IGNORED)[:, 1:]
        counted = (labels != IGNORED) & (segments[:, 1:] == segments[:, :-1])
        # Without a mask torch's causal kernel is quicker.
        mask = (segments > 0).long() if bool((segments == 0).any()) else None
        return {"ids": ids, "mask": mask, "counted": counted, "labels": labels[counted]}

    def load_base(self) -> Any:
        """The pretrained model, frozen."""
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            self.spec["model"], dtype=getattr(torch, self.spec["dtype"]), use_safetensors=True,
            local_files_only=True, trust_remote_code=False,
        )  # fmt: skip
        model.config.use_cache = False
        return model.requires_grad_(False).to(self.device)

    def load_student(self) -> Any:
        """The model with PEFT adapters at the given factors, on the residual if they are a part."""
        import numpy as np
        import torch
        from peft import LoraConfig, get_peft_model

        spec, base = self.spec, self.load_base()
        config = LoraConfig(
            r=spec["rank"], lora_alpha=spec["alpha"], target_modules=spec["target_modules"],
            lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        )  # fmt: skip
        student = get_peft_model(base, config)
        factors = np.load(spec["factors"])
        with torch.no_grad():
            modules: Any = student.base_model.model
            for name, module in modules.named_modules():
                if not hasattr(module, "lora_A"):
                    continue
                a, b = (torch.tensor(factors[f"{name}.{side}"]) for side in "AB")
                adapter_a, adapter_b = module.lora_A["default"], module.lora_B["default"]
                adapter_a.to(torch.float32).weight.copy_(a)
                adapter_b.to(torch.float32).weight.copy_(b)
                if spec["origin"]:
                    weight = module.base_layer.weight
                    start = module.scaling["default"] * (b.to(self.device) @ a.to(self.device))
                    weight.copy_((weight.float() - start).to(weight.dtype))
        return student.train()

    def step(self) -> dict[str, float]:
        """One optimizer step; seconds of wall time and the losses before the update."""
        import torch

        self.synchronize()
        began = time.perf_counter()
        loss, parts = self.loss(next(self.batches))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters, self.spec["clip_norm"] or float("inf")
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        values = {"loss": loss.item(), "grad_norm": norm.item()}
        values |= {name: part.item() for name, part in parts.items()}
        self.synchronize()
        return {"seconds": time.perf_counter() - began} | values

    def loss(self, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The paper's objective on the rows that predict a counted token."""
        import torch

        spec = self.spec
        logits = self.rows(self.student, batch)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        parts = {"task_loss": loss} | dict.fromkeys(TERMS, loss.new_zeros(()))
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.rows(self.teacher, batch)
        for name, settings in spec["terms"].items():
            parts[name] = TERMS[name](logits, teacher, settings)
            loss = loss + settings["weight"] * parts[name]
        return loss, parts

    def rows(self, model: Any, batch: dict[str, Any]) -> Any:
        """Float32 logits [M, V] of the rows that count.

        The head sees these rows alone, where it is nothing but a product: choosing among the rows
        of all logits copies them, forward and backward.
        """
        given, counted = (
            {"input_ids": batch["ids"], "attention_mask": batch["mask"]},
            batch["counted"],
        )
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        if any(getattr(causal.config, name, None) for name in AFTER_THE_HEAD):
            return model(**given).logits[:, :-1][counted].float()
        hidden = getattr(causal, causal.base_model_prefix)(**given).last_hidden_state
        return causal.get_output_embeddings()(hidden[:, :-1][counted]).float()

    def synchronize(self) -> None:
        """Wait for the device, so that the clock means something."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def device_peak(self) -> int | None:
        """Most bytes of device memory so far."""
        import torch

        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def consistency(student: Any, teacher: Any, settings: dict[str, Any]) -> Any:
    """``T² · mean KL(softmax(z_T/T) ‖ softmax(z_S/T))``."""
    from torch.nn.functional import kl_div, log_softmax

    temperature = settings["temperature"]
    return temperature**2 * kl_div(
        log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip


def negative_entropy(student: Any, teacher: Any, settings: dict[str, Any]) -> Any:
    """Minus the mean entropy of the renormalised top-K softmax; 0 is the entire vocabulary."""
    from torch.nn.functional import log_softmax

    del teacher
    top_k = settings["top_k"]
    log_p = log_softmax(student.topk(top_k, -1).values if top_k else student, -1)
    return (log_p.exp() * log_p).sum(-1).mean()


def negative_ratio(student: Any, teacher: Any, settings: dict[str, Any]) -> Any:
    """Minus the share of the k leading singular values; estimated as published where V > 4096."""
    import torch

    del teacher
    k, norm = settings["k"], settings["norm"]
    if norm == "nuclear" or student.shape[1] <= 4096:
        values = torch.linalg.svdvals(student)
    else:
        values = torch.svd_lowrank(student, q=k + 5, niter=2)[1]
    size = values.sum() if norm == "nuclear" else torch.linalg.matrix_norm(student)
    return -values[:k].sum() / size


TERMS = {"consistency": consistency, "diversity": negative_entropy, "spectral": negative_ratio}
"""The published terms by name, ``(student, teacher, settings) -> value``."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
