"""Triton kernels without a GPU: run by Triton's interpreter; and compiled to machine code, with what the assembler reports of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
"""Compute capability → the assembler's name: A100, H100 and H200, B200."""
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One compiled kernel."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread's registers that are stored to memory and loaded again, for want of registers, or its stack."""
    shared: int
    """Bytes of shared memory of a block."""
    warps: int
    """Of a block."""
    instructions: dict[str, int]
    """Machine code: name of the operation → how often it stands there. A loop's body counts once."""

    def line(self, name: str) -> str:
        """The report as a row of a table."""
        total = sum(self.instructions.values())
        used = f"{self.warps:>2} warps {self.registers:>4} registers {self.spilled:>4} B spilled {self.shared:>7,} B shared"
        return f"{name:<50} {used} {total:>6,} instructions"


def compiled(
    kernel: Any, arguments: dict[str, Any], capability: int, warps: int = 4, stages: int = 2, aligned: tuple[str, ...] = ()
) -> Report:
    """Compile `kernel` for GPUs of `capability`, a key of ARCHITECTURES.

    arguments: name → its type in Triton's notation ("*bf16", "i32", "fp32"), or the value of a compile-time constant. Pointers and the
    `aligned` integers are taken as divisible by 16, as a launch finds them. Raises if the assembler refuses the code or reports nothing.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile  # not public; torch's own compiler calls it like this

    names = kernel.arg_names
    assert set(names) == set(arguments), (names, arguments)
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    of = {name: "constexpr" if name in constant else arguments[name] for name in names}
    constants = {(names.index(name),): arguments[name] for name in names if of[name] == "constexpr"}
    known = {(names.index(name),): [["tt.divisibility", 16]] for name in names if of[name].startswith("*") or name in aligned}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces its next defaults
        made = compile(
            ASTSource(kernel, of, constants, known),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "ptx", Path(folder) / "cubin"
        ptx.write_text(made.asm["ptx"])
        cubin.write_bytes(made.asm["cubin"])
        said = _run(
            "ptxas" if capability < 90 else "ptxas-blackwell", "-v", f"--gpu-name={ARCHITECTURES[capability]}", ptx, "-o", "/dev/null"
        )
        code = _run("nvdisasm", "-c", cubin)
    registers = re.findall(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_.x]+)?)", code, re.MULTILINE)
    assert len(registers) == len(spills) == 1 and operations, f"the assembler's report cannot be read: {said}"
    counted: dict[str, int] = {}
    for operation in operations:
        counted[operation] = counted.get(operation, 0) + 1
    return Report(
        registers=int(registers[0]),
        spilled=sum(int(n) for n in spills[0]),
        shared=made.metadata.shared,
        warps=warps,
        instructions=counted,
    )


def interpreted(module: str) -> list[tuple[str, float, float]]:
    """What `interpreted()` of a test module returns where kernels are interpreted: (what, deviation, bound). In its own process: Triton
    decides at its import."""
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6 interprets kernels by int() of arrays of one element, which numpy refuses since 2.4")
    program = f"import json; from {module} import interpreted; print(json.dumps(interpreted()))"
    words = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(words, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[tuple[str, float, float]] = json.loads(done.stdout)
    return found


def _run(program: str, *words: str | Path) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / program
    done = subprocess.run([path, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
