"""Computes ``hf_reference.npz``: what transformers says of the tiny models of ``tests/unit/dmoe/folder_kit.py``.

Run once, by hand, where torch and transformers are installed: ``python tests/vectors/hf_reference.py``. Holds per
family the prompt's ids, the logits of all its positions, 20 greedy tokens and the logits behind each.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from tests.unit.dmoe.folder_kit import FAMILIES, VOCAB, write_folder  # noqa: E402

PROMPT, STEPS = 17, 20
OTHERS = (5, 11)
"""Lengths of two further prompts, of a ragged batch."""
OTHERS_STEPS = 3


def reference(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    random = np.random.RandomState(5)
    ids = random.randint(0, VOCAB, PROMPT)
    prefill, tokens, logits = generate(model, ids, STEPS)
    found = {"ids": ids, "prefill": prefill, "tokens": tokens, "logits": logits}
    for index, length in enumerate(OTHERS):
        other = random.randint(0, VOCAB, length)
        last, tokens, logits = generate(model, other, OTHERS_STEPS)
        found |= {
            f"ids{index}": other,
            f"prefill{index}": last[-1:],
            f"tokens{index}": tokens,
            f"logits{index}": logits,
        }
    return found


def generate(model, ids, steps):
    """All logits of a prompt, then greedy tokens and the logits behind each."""
    tokens, logits = [], []
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids[None]), use_cache=True)
        prefill, last = out.logits[0].numpy(), out.logits[0, -1]
        for _ in range(steps):
            tokens.append(int(last.argmax()))
            out = model(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
            last = out.logits[0, -1]
            logits.append(last.numpy())
    return prefill, np.array(tokens), np.stack(logits)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=Path, help="checkpoints by name of their family; default: written anew")
    parser.add_argument("--out", type=Path, default=HERE / "hf_reference.npz")
    arguments = parser.parse_args()
    found = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            made = arguments.folders / family if arguments.folders else write_folder(Path(folder), family)
            result = reference(made)
        found |= {f"{family}.{key}": value for key, value in result.items()}
        print(family, found[f"{family}.tokens"])
    np.savez_compressed(arguments.out, **found)


if __name__ == "__main__":
    main()
