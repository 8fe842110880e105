"""How the tests compile: programs are tiny here and take longer to compile than to run.

``BALORA_TEST_COMPILER=full`` leaves the compiler as users have it, for twice the time.
"""

import os

_FULL = "BALORA_TEST_COMPILER"
# About 70 % of the compiler's time. An unknown flag ends a process; jaxlib 0.7 to 0.10 know these.
_QUICK = {
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
}


def flags(devices: int | None = None) -> str:
    """``XLA_FLAGS`` for a process, with that many virtual devices."""
    found = {} if os.environ.get(_FULL) == "full" else dict(_QUICK)
    if devices is not None:
        found["xla_force_host_platform_device_count"] = str(devices)
    return " ".join(f"--{name}={value}" for name, value in found.items())


def on_cpu(devices: int | None = None) -> dict[str, str]:
    """Variables for a process of a test's own."""
    return {"XLA_FLAGS": flags(devices), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
