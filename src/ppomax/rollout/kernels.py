"""The compiled parts of a block: kernels.cpp, built once for this processor.

On a processor the small operations between a decoding step's matrix products, a dozen passes over
memory in each block, take as long as the products, and products of few rows reach two thirds of
what the processor can. Where no C++ compiler is found the native engine uses PyTorch's operations.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppomax.models.pull import cache_dir
from ppomax.rollout.sampling import Likely

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)
PATIENCE_SECONDS = 120
SIGNATURES = {
    "norm": "pppp nn f i",
    "swiglu": "pp nn i",
    "attend": "pppp ppppp nnnnn f i",
    "product": "pppp nnn i",
    "logits": "pppp nnn i",
    "most_likely": "pppp nnn i",
}
"""Pointers, numbers, floats and threads, in the order of kernels.cpp."""
ALIKE = {"most_likely"}
"""The same for every compute dtype."""
TILE = 32
"""Positions whose keys are read together: a cache holds a multiple of it."""


@cache
def library() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        return "no C++ compiler (c++, g++ or clang++) is found"
    try:
        built = build(compiler, cache_dir(os.environ) / "kernels")
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


def build(compiler: str, folder: Path) -> Path:
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
    told = SOURCE.read_bytes() + " ".join((*FLAGS, *platform.libc_ver(), macros)).encode()
    built = folder / f"{hashlib.sha256(told).hexdigest()[:16]}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            fresh = Path(place) / built.name
            run("-o", str(fresh), str(SOURCE))
            try:
                built.hardlink_to(fresh)
            except FileExistsError:
                pass  # another process was first, and may use it already
            except OSError:  # a file system without links
                fresh.replace(built)
    return built


class Kernels:
    """The library's functions for one compute dtype, on tensors of the CPU that lie in one piece.

    Residual streams, norms and rotations are fp32, all else is in the compute dtype.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
        self.dtype = dtype
        kind = str(dtype).removeprefix("torch.")
        for name, signature in SIGNATURES.items():
            function = getattr(library, name if name in ALIKE else f"{name}_{kind}", None)
            if function is not None:
                function.argtypes = [kinds[letter] for letter in signature.replace(" ", "")]
                function.restype = None
            setattr(self, f"_{name}", function)
        self.panel = int(getattr(library, f"panel_{kind}")()) if self._product else 0
        """Outputs of a product that are packed together; 0 where kernels.cpp has none for this
        processor: its bf16 units are none that it knows, or oneDNN makes more of them."""

    def norm(self, stream: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of the stream, to which `added` is added in place first; [tokens, hidden].

        Args:
            stream: [tokens, hidden].
            added: the same in the compute dtype.
            weight: [hidden].
        """
        out = stream.new_empty(stream.shape, dtype=self.dtype)
        self._norm(_at(stream), _at(added), _at(weight), _at(out), *stream.shape, eps, _threads())
        return out

    def pack(self, weight: Tensor) -> Tensor | None:
        """[outputs, inputs] as `product` reads it, a copy; None where it cannot.

        In panels of outputs, [panels, inputs / depth, panel, depth], the last filled up with zeros.
        """
        outputs, inputs = weight.shape
        depth = 1 if self.dtype == torch.float32 else 2
        if not self.panel or inputs % depth:
            return None
        panels = -(-outputs // self.panel)
        padded = weight.new_zeros(panels * self.panel, inputs, dtype=self.dtype)
        padded[:outputs] = weight
        return padded.view(panels, self.panel, -1, depth).transpose(1, 2).contiguous()

    def product(self, outputs: int, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """X W + b, [rows, outputs].

        Args:
            x: [rows, inputs].
            packed: of `pack`.
            bias: [outputs].
        """
        return self._multiplied(self._product, self.dtype, outputs, x, packed, bias)

    def logits(self, outputs: int, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """The same, rounded as `product` rounds and kept in fp32."""
        return self._multiplied(self._logits, torch.float32, outputs, x, packed, bias)

    def _multiplied(
        self,
        function: Callable[..., None],
        dtype: torch.dtype,
        outputs: int,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        out = x.new_empty(len(x), outputs, dtype=dtype)
        function(*map(_at, (x, packed, bias, out)), *x.shape, outputs, _threads())
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, [tokens, width], from both side by side, [tokens, 2 width]."""
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._swiglu(_at(gate_up), _at(out), rows, width, _threads())
        return out

    def attend(
        self,
        qkv: Tensor,
        qk_norm: Tensor | None,
        turns: tuple[Tensor, Tensor],
        positions: Tensor,
        slots: Tensor | None,
        keys: Tensor,
        values: Tensor,
        eps: float,
    ) -> Tensor:
        """Write each token's key and value to the cache, then read it so far; [n, heads * dim].

        Args:
            qkv: queries, keys and values side by side, not rotated yet,
                [n, (heads + 2 kv_heads) * dim].
            qk_norm: weights of the norm of each query and key head, [heads + kv_heads, dim].
            turns: cosines, and sines that are negative where a rotation subtracts,
                [length, 1, dim].
            positions: where each token stands in its text, [n].
            slots: of its text, [n]; without them token i is of slot i.
            keys: [slots, kv_heads, dim, length], the length a multiple of `TILE`.
            values: [slots, kv_heads, length, dim].
        """
        count, width = qkv.shape
        _, kv_heads, dim, length = keys.shape
        if length % TILE or turns[0].shape[-1] != dim:
            raise ValueError(f"a cache of {length} positions of {dim} numbers is not read")
        heads = width // dim - 2 * kv_heads
        out = qkv.new_empty(count, heads * dim)
        given = (qkv, qk_norm, *turns, positions, slots, keys, values, out)
        self._attend(*map(_at, given), count, heads, kv_heads, dim, length, eps, _threads())
        return out

    def most_likely(self, logits: Tensor, count: int) -> Likely:
        """As `sampling.look`; equals come in the order of their ids.

        Args:
            logits: fp32, [batch, vocab].
        """
        batch, vocab = logits.shape
        values, normaliser = logits.new_empty(batch, count), logits.new_empty(batch)
        ids = logits.new_empty(batch, count, dtype=torch.long)
        given = (logits.contiguous(), values, ids, normaliser)
        self._most_likely(*map(_at, given), batch, vocab, count, _threads())
        return Likely(values, ids, normaliser)

    _norm: Any
    _swiglu: Any
    _attend: Any
    _product: Any
    _logits: Any
    _most_likely: Any


def _at(tensor: Tensor | None) -> int | None:
    """The address of its first element."""
    if tensor is None:
        return None
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("compiled kernels read tensors of the CPU that lie in one piece")
    return tensor.data_ptr()


def _threads() -> int:
    return torch.get_num_threads()
