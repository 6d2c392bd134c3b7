"""Log probabilities of tokens. Pure.

They are of the model's own distribution: the softmax of its logits as they come, before temperature, filters,
penalties, bias and bans. So they do not depend on how a token was chosen, and a chosen token may be an unlikely one.
"""

import numpy as np
from numpy.typing import NDArray

from dmoe.core.sampling import largest

LOGPROB_MIN = -9999.0
"""What stands for minus infinity, which JSON cannot spell (OpenAI API reference: "very unlikely")."""


def logprobs(logits: NDArray[np.float32], token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """The natural log probability of ``token`` under ``logits`` f32[V], and of the ``top`` likeliest tokens, likeliest
    first, among equals the lower id. Computed in f64: log p[j] = z[j] - log(sum(exp(z)))."""
    wide = logits.astype(np.float64)
    peak = wide.max()
    with np.errstate(under="ignore"):
        total = float(peak + np.log(np.exp(wide - peak).sum()))
    ids = largest(logits, min(top, len(logits))) if top else np.empty(0, dtype=np.intp)
    order = ids[np.argsort(-wide[ids], kind="stable")]
    return _bounded(wide[token] - total), [(int(each), _bounded(wide[each] - total)) for each in order]


def _bounded(value: float) -> float:
    return max(float(value), LOGPROB_MIN)
