"""Triton builds every kernel for CUDA down to machine code, for which it needs no GPU; running it does."""

from __future__ import annotations

import inspect

import pytest

triton = pytest.importorskip("triton", reason="Triton has no build for this system")

NORM = {"SCALED": True, "ADDED": True, "PIXELS": 128, "GROUPS": 8, "CHANNELS": 4}
KERNELS = {
    "forward": NORM,
    "backward": NORM,
    "weighted_sum": {"TERMS": 5, "WEIGHTED": 3, "BLOCK": 1024},
    "weighted_error": {"BLOCK": 1024},
}
FLOATS, COUNTS = {"eps", "s0", "s1", "s2", "s3", "s4"}, {"groups", "width", "pixels", "size", "stride"}
VALUES = {"x", "out", "grad", "scale", "shift", "added", "v0", "v1", "v2", "v3", "v4", "a", "b"}


def kind(name: str, dtype: str) -> str:
    if name in FLOATS:
        return "fp32"
    if name in COUNTS or name.endswith(("_n", "_c", "_p")) or name in {"n0", "n1", "n2", "n3", "n4"}:
        return "i32"
    return f"*{dtype if name in VALUES else 'fp32'}"


@pytest.mark.parametrize(
    "capability", [80, pytest.param(75, marks=pytest.mark.slow), pytest.param(90, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_build_for_cuda(kernel: str, capability: int, tmp_path, monkeypatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from chaindiff.kernels import triton_group_norm, triton_sums

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_group_norm, kernel, None) or getattr(triton_sums, kernel)
    constants, dtype = KERNELS[kernel], "fp16" if capability < 80 else "bf16"
    signature = {
        name: "constexpr" if name in constants else kind(name, dtype)
        for name in inspect.signature(function.fn).parameters
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert len(built.asm["cubin"]) > 1000
    assert "st.local" not in built.asm["ptx"]
