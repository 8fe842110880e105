"""MKL's fast path for the torch reference, on processors that MKL gives its slow one."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

# What MKL asks before it chooses its kernels; on AMD's processors it answers no, whatever
# instructions they have, and products take two to three times as long.
_ANSWER = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def fast_path(folder: Path) -> dict[str, str]:
    """Variables of a process in which MKL takes the fast path; none where it needs no help.

    Args:
        folder: gets a library of one function, made by the C compiler of the machine. Without a
            compiler MKL keeps the path it chooses; the reference says which that is.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not is_amd():
        return {}
    source, library = folder / "answer.c", folder / "answer.so"
    source.write_text(_ANSWER, encoding="ascii")
    made = subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, source], capture_output=True, check=False
    )
    if made.returncode:
        return {}
    before = os.environ.get("LD_PRELOAD", "")
    return {"LD_PRELOAD": f"{library} {before}".strip()}


def is_amd() -> bool:
    """Whether this is a Linux machine with a processor of AMD."""
    file = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not file.is_file():
        return False
    return "AuthenticAMD" in file.read_text(encoding="utf-8", errors="replace")
