"""Computes ``embeddings.json``: the mean of transformers' last hidden states, of length 1, for tiny models of
``tests/unit/dmoe/folder_kit.py``.

Run once, by hand, where torch and transformers are installed: ``python tests/vectors/embedding_reference.py``.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from tests.unit.dmoe.folder_kit import VOCAB, write_folder  # noqa: E402

LENGTHS = (1, 23)


def vectors(folder):
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for length in LENGTHS:
        ids = np.random.RandomState(length).randint(0, VOCAB, length)
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor(ids[None])).last_hidden_state[0].double().mean(0).numpy()
        yield {"ids": ids.tolist(), "vector": (hidden / np.linalg.norm(hidden)).astype(np.float32).tolist()}


def main():
    found = {}
    for family in ("llama", "mixtral"):
        with tempfile.TemporaryDirectory() as folder:
            found[family] = list(vectors(write_folder(Path(folder), family)))
    (HERE / "embeddings.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
