"""lm-eval as it comes, over ``/v1/completions``: its log-likelihoods are those of the model's own logits.

What they must be is computed here from a runner of the same stored model, without engine and gateway.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from gateway_rig import serving

from dmoe.store import ModelStore
from tests.interop.environments import program_of, run
from tests.unit.dmoe.answer_kit import engine_running, request
from tests.unit.dmoe.model_kit import TOKENS, feed, load

SAID_NEXT = 161
"""What this model says behind each choice of the first question, and where it stops: no choice may suffer from that."""
MODEL = {"change": {"llama.context_length": 2048, "tokenizer.ggml.eos_token_id": SAID_NEXT}}
STOP = TOKENS[0]
CHOICES = [
    {"context": "one two", "choices": [" three", " zz", " x"], "gold": 0},
    {"context": "hello", "choices": [" you", " zzzz", "!"], "gold": 1},
    {"context": "ab", "choices": ["a", "b", "cd"], "gold": 2},
]
TEXTS = [{"text": "the cab is here"}, {"text": "a"}]
SHARED = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
target_delimiter: ""
"""
RANKED = f"""
task: ranked
{SHARED}
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
ROLLING = f"""
task: rolling
{SHARED}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
WRITTEN = f"""
task: written
{SHARED}
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: ""
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 6, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


@dataclass(frozen=True)
class Seen:
    """What lm-eval wrote down: of each task its answers, item by item, and its results."""

    answers: dict[str, list[list[Any]]]
    results: dict[str, Any]


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    for task, text, rows in (("ranked", RANKED, CHOICES), ("rolling", ROLLING, TEXTS), ("written", WRITTEN, TEXTS)):
        data = folder / f"{task}.json"
        data.write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{task}.yaml").write_text(text.replace("FILE", str(data)))


def write_tokenizer(folder: Path, models: Path) -> None:
    """The model's own, in the form that its users have."""
    (file,) = models.glob("*/tokenizer.json")
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(file.read_bytes())
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "eos_token": STOP}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


async def evaluated(folder: Path, url: str, key: str) -> Seen:
    """Run lm-eval; nothing of it looks for the internet."""
    out = folder / "out"
    arguments = {
        "model": "tiny",
        "base_url": f"{url}/v1/completions",
        "tokenizer": folder / "tokenizer",
        "tokenizer_backend": "huggingface",
        "num_concurrent": 2,
        "max_retries": 2,
        "max_length": 2048,
    }
    listed = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [program_of("lm_eval", "lm_eval"), "run", "--model", "local-completions", "--model_args", listed]
    command += ["--tasks", "ranked,rolling,written", "--include_path", str(folder / "tasks"), "--log_samples"]
    command += ["--batch_size", "3", "--output_path", str(out)]
    await run(command, env={"OPENAI_API_KEY": key, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""})
    (results,) = out.rglob("results_*.json")
    return Seen(
        {task: samples(out, task) for task in ("ranked", "rolling", "written")},
        json.loads(results.read_text())["results"],
    )


def samples(out: Path, task: str) -> list[list[Any]]:
    (file,) = out.rglob(f"samples_{task}_*.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [[answer[0] for answer in row["resps"]] for row in rows]


async def likelihood(runner: Any, tokens: list[int], start: int) -> tuple[float, bool]:
    """ln p of the tokens from ``start`` on, given those before; whether each is the likeliest there."""
    logits = (await feed(runner, await runner.open(len(tokens)), tokens)).astype(np.float64)[start - 1 : -1]
    peaks = logits.max(-1)
    spread = peaks + np.log(np.exp(logits - peaks[:, None]).sum(-1))
    chosen = logits[np.arange(len(logits)), tokens[start:]]
    return float((chosen - spread).sum()), bool((chosen == peaks).all())


async def wanted(models: Path, spelled: Callable[[str], Any]) -> tuple[list[list[tuple[float, bool]]], list[float]]:
    """Of each choice ln p and whether it is greedy; of each text ln p behind the token that ends texts."""
    store = ModelStore(models)
    (manifest,) = store.manifests().values()
    runner = await trio.to_thread.run_sync(load, store, manifest)
    ranked = []
    for item in CHOICES:
        starts = len(await spelled(item["context"]))
        whole = [await spelled(item["context"] + choice) for choice in item["choices"]]
        ranked.append([await likelihood(runner, tokens, starts) for tokens in whole])
    rolling = [await likelihood(runner, [0, *await spelled(each["text"])], 1) for each in TEXTS]
    return ranked, [value for value, _ in rolling]


async def test_log_likelihoods_are_those_of_the_logits(tmp_path: Path) -> None:
    program_of("lm_eval", "lm_eval")
    write_tasks(tmp_path / "tasks")
    async with (
        engine_running(tmp_path, route="local", **MODEL) as engine,
        serving(tmp_path / "data", engine=engine) as rig,
    ):
        write_tokenizer(tmp_path / "tokenizer", tmp_path / "models")
        seen = await evaluated(tmp_path, rig.gateway.url, rig.key)

        async def spelled(text: str) -> list[int]:
            return list((await engine.prepare(request(text))).prompt_tokens)

        ranked, rolling = await wanted(tmp_path / "models", spelled)
        written = await rig.with_openai(
            lambda client: [
                client.completions.create(model="tiny", prompt=each["text"], max_tokens=6, temperature=0, stop="\n\n")
                for each in TEXTS
            ]
        )
    for ours, theirs in zip(ranked, seen.answers["ranked"], strict=True):
        assert [float(value) for value, _ in theirs] == pytest.approx([value for value, _ in ours], abs=1e-4)
        assert [str(greedy) for _, greedy in theirs] == [str(greedy) for _, greedy in ours]
    right = [
        max(range(3), key=lambda n, row=row: row[n][0]) == item["gold"]
        for row, item in zip(ranked, CHOICES, strict=True)
    ]
    assert seen.results["ranked"]["acc,none"] == pytest.approx(sum(right) / len(right))
    flat = [float(answer[0] if isinstance(answer, list) else answer) for (answer,) in seen.answers["rolling"]]
    assert flat == pytest.approx(rolling, abs=1e-4)
    assert [answer for (answer,) in seen.answers["written"]] == [each.choices[0].text for each in written]
