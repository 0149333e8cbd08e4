"""Our stub of NVIDIA's library, compiled here, so that the real nvidia-ml-py runs where there is no driver."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("meter") / "nvmlstub.c"


def compiled(folder: Path) -> Path:
    """The folder, with ``libnvidia-ml.so.1`` in it: put it first in ``LD_LIBRARY_PATH``."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "the stub NVML needs a C compiler: python tests/system_packages.py"
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(_SOURCE)], check=True)
    return folder


def stand(file: Path, *boards: tuple[float, float, float]) -> None:
    """Let the boards stand at (joules, watts, percent busy) from now on; negative joules: it has no counter."""
    temporary = file.with_suffix(".part")
    temporary.write_text("".join(f"{joules} {watts} {percent}\n" for joules, watts, percent in boards))
    os.replace(temporary, file)
