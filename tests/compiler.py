"""The compiler of the tests: programs are tiny here and take longer to compile than to run.

``BALORA_TEST_COMPILER=full`` leaves the compiler as users have it, for twice the time. What is
compiled is kept for the other processes of the same tests, or in ``JAX_COMPILATION_CACHE_DIR``
for the next tests too.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

_FULL = "BALORA_TEST_COMPILER"
# Flags that XLA was found to take: processes that tests start inherit the answer and ask no more.
_FOUND = "BALORA_TEST_XLA_FLAGS"
# About 70 % of the compiler's time. XLA ends a process that names a flag it does not know, without
# an exception, and what it knows is to be had in no other way: its binary still holds the names of
# flags that are gone. So a flag is taken if a process with it lives. jaxlib 0.12 lost the first.
_QUICK = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
# What JAX does first on a CPU, without the import of JAX: 0.2 s.
_START = "from jaxlib import xla_client; xla_client.make_cpu_client()"


def flags(devices: int | None = None) -> str:
    """``XLA_FLAGS`` for a process, with that many virtual devices.

    Raises:
        RuntimeError: XLA does not start; with what it says. Under pytest nothing else would say it.
    """
    if _FOUND not in os.environ:
        os.environ[_FOUND] = " ".join(_taken())
    count = "" if devices is None else f"--xla_force_host_platform_device_count={devices}"
    return f"{os.environ[_FOUND]} {count}".strip()


def on_cpu(devices: int | None = None) -> dict[str, str]:
    """Variables for a process of a test's own."""
    return {"XLA_FLAGS": flags(devices), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}


def cache() -> None:
    """Set the variables of JAX's compilation cache for this process and those that it starts."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="balora-compiled.")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def _taken() -> list[str]:
    """Those of ``_QUICK`` that XLA starts with, beside the flags of the environment."""
    own = os.environ.get("XLA_FLAGS", "")
    wanted = [] if os.environ.get(_FULL) == "full" else list(_QUICK)
    if not _refusal(own, *wanted):
        return wanted
    with ThreadPoolExecutor() as pool:
        refusals = list(pool.map(_refusal, wanted))
    taken = [flag for flag, refusal in zip(wanted, refusals, strict=True) if not refusal]
    refusal = _refusal(own, *taken)
    if refusal:
        raise RuntimeError(
            f"XLA does not start with XLA_FLAGS={' '.join([own, *taken])!r}: {refusal}"
        )
    return taken


def _refusal(*flags: str) -> str:
    """How XLA ends a process with these flags; nothing if it starts."""
    done = subprocess.run(
        [sys.executable, "-c", _START],
        env={**os.environ, "XLA_FLAGS": " ".join(flags)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # After a wrong value XLA lists hundreds of flags.
    return "" if done.returncode == 0 else f"exit code {done.returncode}, {done.stderr[:800]}"
