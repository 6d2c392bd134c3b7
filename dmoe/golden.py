"""Golden logits: does this machine compute what the publisher computed?

Owns: the prompt, the tolerance and the comparison. The route is ``local``: pieces with wire roundings, so every layer
takes part; they are run one by one (``dmoe/layerwise``), so that a model larger than memory can be checked. Another CPU
family sums in another order, and quantised activations amplify that: hence a tolerance.
"""

from collections.abc import Callable

import numpy as np

from config.errors import IntegrityError
from dmoe.core.manifest import Golden, Manifest
from dmoe.layerwise import last_logits, last_logits_here
from dmoe.runtime import RuntimeOptions, ShardFiles

TOKENS = 12
TOP = 8
TOLERANCE_FP32 = 0.05
TOLERANCE_QUANTISED = 2.5
"""Measured between two attention kernels: 0.64, the median of the largest difference."""


Ran = Callable[[int], None]
"""Called after every piece that was run, with its bytes."""


def _silent(count: int) -> None:
    """Nobody watches."""


def compute_golden(manifest: Manifest, store: ShardFiles, options: RuntimeOptions, ran: Ran = _silent) -> Golden:
    """The top logits behind a fixed prompt, computed here and now."""
    vocab = manifest.architecture.vocab
    prompt = tuple((7919 * index + 13) % vocab for index in range(min(TOKENS, manifest.architecture.context)))
    logits = last_logits_here(manifest, store, options, prompt, ran)
    top = np.argsort(-logits, kind="stable")[:TOP]
    return Golden(
        prompt=prompt,
        tokens=tuple(int(token) for token in top),
        logits=tuple(float(logits[token]) for token in top),
        tolerance=TOLERANCE_FP32 if manifest.quantisation == "fp32" else TOLERANCE_QUANTISED,
    )


async def verify(manifest: Manifest, store: ShardFiles, options: RuntimeOptions, ran: Ran = _silent) -> float:
    """Run the manifest's golden prompt here. Returns the largest difference.

    Raises IntegrityError if it exceeds the manifest's tolerance, or if a shard's file is altered.
    """
    golden = manifest.golden
    logits = await last_logits(manifest, store, options, golden.prompt, ran)
    difference = float(np.abs(logits[list(golden.tokens)] - np.array(golden.logits)).max())
    if not difference <= golden.tolerance:
        raise IntegrityError(
            "integrity",
            f"{manifest.name}: this machine's logits differ by {difference:.3g} from the manifest's golden logits; "
            f"{golden.tolerance:.3g} are tolerated",
            "get the model again; if that does not help, this machine's processor computes wrongly",
        )
    return difference
