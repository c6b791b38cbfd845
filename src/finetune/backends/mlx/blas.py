"""Gives MLX a fast BLAS on Linux, where its own package brings only the slow reference one.

The first library to offer a symbol to the whole process wins. So OpenBLAS or MKL, loaded that way *before* MLX is,
multiplies in its place: 74 against 4.6 GFLOP/s, 1024 x 1024 on two x86-64 cores. On macOS MLX uses Apple's own.
"""

import ctypes
import functools
import glob
import os
import sys

_NEEDED = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "sgesdd_")
"""A few of the names that MLX calls; a library without them is none that can stand in."""
_SONAMES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")
_IN_ENVIRONMENT = ("libopenblas.so*", "libopenblasp.so*", "libmkl_rt.so*")
NOTE = (
    "MLX multiplies matrices about fifteen times slower here than it could: no OpenBLAS was found. Install it with "
    "`apt-get install libopenblas0-pthread` (Debian, Ubuntu), `dnf install openblas` (Fedora) or `pip install mkl`"
)


@functools.cache
def load_fast_blas() -> str:
    """Load a fast BLAS for the whole process; returns the library's name, or "" where there is none or no need.

    It must come before the first import of `mlx.core`: by then MLX has bound itself to its own.
    """
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return ""
    if _offers(ctypes.CDLL(None)):
        return "already in the process"
    folder = os.path.join(sys.prefix, "lib")
    own = (path for pattern in _IN_ENVIRONMENT for path in sorted(glob.glob(os.path.join(folder, pattern))))
    for name in (*_SONAMES, *own):
        try:
            # Looked at first without handing it to everybody: what is global once stays so.
            if _offers(ctypes.CDLL(name, mode=ctypes.RTLD_LOCAL)):
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
                return os.path.basename(name)
        except OSError:
            continue
    return ""


def _offers(library: ctypes.CDLL) -> bool:
    return all(hasattr(library, name) for name in _NEEDED)


def blas_name() -> str:
    """What multiplies matrices on the processor here."""
    if not sys.platform.startswith("linux"):
        return "Accelerate"
    return load_fast_blas() or "netlib, the slow reference"


def blas_note() -> str:
    """What to install to make MLX fast on this machine, or "" when nothing is missing."""
    import mlx.core as mx

    slow = sys.platform.startswith("linux") and mx.default_device() == mx.cpu and not load_fast_blas()
    return NOTE if slow else ""
