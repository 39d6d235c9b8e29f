"""Kernels in C++, built once for this processor with the compiler that is found.

On a processor the small operations between matrix products, dozens of passes over memory in each
block, take as long as the products, and products themselves can be had faster in places. Where no
C++ compiler is found PyTorch's operations are used.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ppomax.models.pull import cache_dir

HEADERS = tuple(Path(__file__).with_name(name) for name in ("compiled.h", "tiles.h"))
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)
PATIENCE_SECONDS = 120
SWITCH = "PPOMAX_KERNELS"
"""Environment variable; 0: none are used anywhere, for comparison and for finding faults."""


@cache
def library(source: Path) -> ctypes.CDLL | str:
    """The kernels of a source, or why there are none."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        return "no C++ compiler (c++, g++ or clang++) is found"
    try:
        built = build(compiler, source, cache_dir(os.environ) / "kernels")
    except subprocess.CalledProcessError as failed:
        lines = failed.stderr.strip().splitlines() or [f"exit status {failed.returncode}"]
        told = next((line for line in lines if "error" in line), lines[0])
        return f"{compiler} does not build them: {told}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as failed:  # no home: RuntimeError
        return f"{compiler} does not build them: {failed}"
    try:
        return ctypes.CDLL(str(built))
    except OSError as failed:
        return f"what {compiler} has built cannot be loaded (delete it to build anew): {failed}"


def build(compiler: str, source: Path, folder: Path) -> Path:
    """The shared library for this compiler and this processor, built where it is not there yet.

    Raises:
        subprocess.CalledProcessError: the compiler fails.
        subprocess.TimeoutExpired: or takes minutes.
        OSError: the folder cannot be written to.
    """

    def run(*arguments: str) -> str:
        return subprocess.run(
            [compiler, *FLAGS, *arguments],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE_SECONDS,
            env=os.environ | {"LC_ALL": "C"},
        ).stdout

    macros = run("-dM", "-E", "-x", "c++", os.devnull)  # tell compiler, version and processor
    read = b"".join(path.read_bytes() for path in (source, *HEADERS))
    told = read + " ".join((*FLAGS, *platform.libc_ver(), macros)).encode()
    built = folder / f"{hashlib.sha256(told).hexdigest()[:16]}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            fresh = Path(place) / built.name
            run(f"-I{HEADERS[0].parent}", "-o", str(fresh), str(source))
            try:
                built.hardlink_to(fresh)
            except FileExistsError:
                pass  # another process was first, and may use it already
            except OSError:  # a file system without links
                fresh.replace(built)
    return built


class Compiled:
    """The functions of a library for one compute dtype, on tensors of the CPU in one piece."""

    signatures: ClassVar[dict[str, str]] = {}
    """Pointers, numbers, floats and threads of each function, in the order of its source."""
    alike: ClassVar[frozenset[str]] = frozenset()
    """The same for every compute dtype."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
        self.dtype = dtype
        self.kind = str(dtype).removeprefix("torch.")
        for name, signature in self.signatures.items():
            exported = name if name in self.alike else f"{name}_{self.kind}"
            function = getattr(library, exported, None)
            if function is not None:
                function.argtypes = [kinds[letter] for letter in signature.replace(" ", "")]
                function.restype = None
            setattr(self, f"_{name}", function)


def address(tensor: Tensor | None) -> int | None:
    """Of its first element."""
    if tensor is None:
        return None
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("compiled kernels read tensors of the CPU that lie in one piece")
    return tensor.data_ptr()


def threads() -> int:
    """As many as PyTorch's own operations use."""
    return torch.get_num_threads()
