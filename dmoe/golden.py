"""Golden logits: does this machine compute what the publisher computed?

Owns: the prompt, the tolerance and the comparison. The route is ``local``: pieces with wire roundings, so every shard
takes part. Another CPU family sums in another order, and quantised activations amplify that: hence a tolerance.
"""

import numpy as np

from config.errors import IntegrityError
from dmoe.core.manifest import Golden, Manifest
from dmoe.layers import LocalExperts, Trunk, forward
from dmoe.runtime import ExpertShard, RuntimeOptions, ShardFiles

TOKENS = 12
TOP = 8
TOLERANCE_FP32 = 0.05
TOLERANCE_QUANTISED = 2.5
"""Measured between two attention kernels: 0.64, the median of the largest difference."""


async def compute_golden(manifest: Manifest, store: ShardFiles, options: RuntimeOptions) -> Golden:
    """The top logits behind a fixed prompt, computed here."""
    vocab = manifest.architecture.vocab
    prompt = tuple((7919 * index + 13) % vocab for index in range(min(TOKENS, manifest.architecture.context)))
    logits = await _logits(manifest, store, options, prompt)
    top = np.argsort(-logits, kind="stable")[:TOP]
    return Golden(
        prompt=prompt,
        tokens=tuple(int(token) for token in top),
        logits=tuple(float(logits[token]) for token in top),
        tolerance=TOLERANCE_FP32 if manifest.quantisation == "fp32" else TOLERANCE_QUANTISED,
    )


async def verify(manifest: Manifest, store: ShardFiles, options: RuntimeOptions) -> float:
    """Run the manifest's golden prompt here. Returns the largest difference.

    Raises IntegrityError if it exceeds the manifest's tolerance, or if a shard's file is altered.
    """
    golden = manifest.golden
    logits = await _logits(manifest, store, options, golden.prompt)
    difference = float(np.abs(logits[list(golden.tokens)] - np.array(golden.logits)).max())
    if not difference <= golden.tolerance:
        raise IntegrityError(
            "integrity",
            f"{manifest.name}: this machine's logits differ by {difference:.3g} from the manifest's golden logits; "
            f"{golden.tolerance:.3g} are tolerated",
            "get the model again; if that does not help, this machine's processor computes wrongly",
        )
    return difference


async def _logits(
    manifest: Manifest, store: ShardFiles, options: RuntimeOptions, prompt: tuple[int, ...]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    trunk = Trunk(manifest, store, options)
    shards = [ExpertShard(manifest, shard, store, options) for shard in manifest.expert_shards()]
    experts = LocalExperts(manifest, shards)
    try:
        return await forward(trunk, trunk.new_sequence(len(prompt)), prompt, experts)
    finally:
        experts.close()
