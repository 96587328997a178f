"""CPUID and XGETBV (Intel SDM vol. 2): two instructions that no system call stands for."""

import ctypes
import mmap
from functools import cache
from typing import Final

# push rbx; mov r8, rdx; mov eax, edi; mov ecx, esi; cpuid; four stores to [r8]; pop rbx; ret
_CPUID: Final = bytes.fromhex("53 4989d0 89f8 89f1 0fa2 418900 41895804 41894808 4189500c 5b c3")
# xor ecx, ecx; xgetbv; shl rdx, 32; or rax, rdx; ret
_XGETBV: Final = bytes.fromhex("31c9 0f01d0 48c1e220 4809d0 c3")
_XGETBV_AT: Final = 64


@cache
def _code() -> tuple[mmap.mmap, int]:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(_CPUID)] = _CPUID
    page[_XGETBV_AT : _XGETBV_AT + len(_XGETBV)] = _XGETBV
    return page, ctypes.addressof(ctypes.c_char.from_buffer(page))


def cpuid(leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """(eax, ebx, ecx, edx) of a leaf."""
    out = (ctypes.c_uint32 * 4)()
    function = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(_code()[1])
    function(leaf, subleaf, ctypes.addressof(out))
    return out[0], out[1], out[2], out[3]


def xcr0() -> int:
    """The state components that the kernel has enabled; only where CPUID says OSXSAVE, else SIGILL."""
    value: int = ctypes.CFUNCTYPE(ctypes.c_uint64)(_code()[1] + _XGETBV_AT)()
    return value
