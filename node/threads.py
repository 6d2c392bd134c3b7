"""Holds the thread pools that libraries make for themselves to ``dmoe.threads``.

They read these variables once, when they are loaded: :func:`bound` comes before the first import of numpy. Our own
pools and ONNX Runtime's get the number where they are made (``dmoe.runtime.RuntimeOptions``).
"""

import os

VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)


def bound(count: int) -> None:
    """At most ``count`` threads in each library; 0: as many as they like. What the operator has set stays."""
    if count:
        for name in VARIABLES:
            os.environ.setdefault(name, str(count))
