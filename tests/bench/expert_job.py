"""hivemind's job behind this project's interfaces: feed-forward experts 1024-4096-1024 with tanh-gelu, residual and
LayerNorm (eps 1e-12), fp32 weights.

Owns: the graph, its sessions and the manifests that name the experts. Does not own: who serves or calls them.
"""

import time
from hashlib import sha256

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from dmoe.core.manifest import Architecture, Golden, Manifest, ModelFile, Router, Shard, Source
from dmoe.runtime import weighted_sum
from p2p.core.identity import Identity

HIDDEN, INNER = 1024, 4096
EXPERTS = 8
"""Per server."""
GROUPS = 4
"""Sum groups, as many as an import makes."""
FLOPS_PER_ROW = 2 * 2 * HIDDEN * INNER
WEIGHT_BYTES = 4 * 2 * HIDDEN * INNER
PUBLISHER = Identity.from_seed(b"p" * 32)


def session(seed: int) -> ort.InferenceSession:
    """One expert with random weights on one thread, without a pool."""
    random = np.random.default_rng(seed)

    def constant(name: str, values: np.ndarray):
        return numpy_helper.from_array(np.asarray(values, np.float32), name)

    row = ["batch", HIDDEN]
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["a"]),
            helper.make_node("Gelu", ["a"], ["g"], approximate="tanh"),
            helper.make_node("Gemm", ["g", "w2", "b2"], ["o"]),
            helper.make_node("Add", ["x", "o"], ["r"]),
            helper.make_node("LayerNormalization", ["r", "lw", "lb"], ["y"], axis=-1, epsilon=1e-12),
        ],
        "ffn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, row)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, row)],
        [
            constant("w1", random.standard_normal((HIDDEN, INNER), np.float32) * HIDDEN**-0.5),
            constant("b1", random.standard_normal(INNER)),
            constant("w2", random.standard_normal((INNER, HIDDEN), np.float32) * INNER**-0.5),
            constant("b2", random.standard_normal(HIDDEN)),
            constant("lw", np.ones(HIDDEN)),
            constant("lb", np.zeros(HIDDEN)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def reference(seed: int, x: np.ndarray) -> np.ndarray:
    """The job in numpy and fp64, from the same weights: what :func:`session` must compute."""
    random = np.random.default_rng(seed)
    w1 = (random.standard_normal((HIDDEN, INNER), np.float32) * HIDDEN**-0.5).astype(np.float64)
    b1 = random.standard_normal(INNER)
    w2 = (random.standard_normal((INNER, HIDDEN), np.float32) * INNER**-0.5).astype(np.float64)
    b2 = random.standard_normal(HIDDEN)
    a = x.astype(np.float64) @ w1 + b1
    gelu = 0.5 * a * (1 + np.tanh(0.7978845608 * (a + 0.044715 * a**3)))
    r = x + gelu @ w2 + b2
    centred = r - r.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12)


class FfnShard:
    """Some experts behind :class:`dmoe.worker.Shard`: the routing is the product's, the experts are plain sessions."""

    def __init__(self, experts: tuple[int, ...], sessions: dict[int, ort.InferenceSession]) -> None:
        self.ram_bytes = WEIGHT_BYTES * len(experts)
        self._experts = {expert: sessions[expert] for expert in experts}

    def partial(self, _layer, h, experts, weights):
        """The weighted partial sum ``f32[N, H]``."""
        return weighted_sum(tuple(self._experts), h, experts, weights, self._run)

    def _run(self, expert: int, h: np.ndarray) -> np.ndarray:
        return self._experts[expert].run(None, {"x": h})[0]

    def close(self) -> None:
        """Nothing to free: the sessions belong to the process."""


def manifest(experts: int, top_k: int, *, wire_dtype: str = "fp16") -> Manifest:
    """One layer of so many experts, in :data:`GROUPS` sum groups, a shard each, and a trunk nobody runs."""
    groups = tuple(tuple(int(e) for e in part) for part in np.array_split(np.arange(experts), GROUPS))
    shards = [
        Shard(
            id=f"expert-l0-0-g{group}",
            kind="expert",
            layers=(0, 0),
            group=group,
            experts=members,
            files=(_file(f"g{group}.bin"),),
            params=len(members) * 2 * HIDDEN * INNER,
            flops_per_row=FLOPS_PER_ROW * len(members),
            ram_bytes=WEIGHT_BYTES * len(members),
            dtype="fp32",
        )
        for group, members in enumerate(groups)
    ]
    trunk = Shard(
        id="trunk",
        kind="trunk",
        layers=(0, 0),
        group=-1,
        experts=(),
        files=(_file("trunk.bin"),),
        params=1,
        flops_per_row=1,
        ram_bytes=1,
        dtype="fp32",
    )
    made = Manifest(
        name=f"ffn-{experts}-{wire_dtype}",
        licence="MIT",
        source=Source(name="random weights", sha256="0" * 64),
        architecture=Architecture(
            family="llama",
            hidden=HIDDEN,
            layers=1,
            heads=8,
            kv_heads=8,
            head_dim=128,
            vocab=32,
            intermediate=INNER,
            rope_theta=1e4,
            rope_interleaved=False,
            norm_eps=1e-12,
            tie_embeddings=True,
            context=64,
            router=Router(kind="softmax_topk", experts=experts, top_k=top_k),
        ),
        quantisation="fp32",
        wire_dtype=wire_dtype,
        sum_groups=groups,
        shards=(*shards, trunk),
        tokenizer=_file("tokenizer.json"),
        chat_template="",
        stop_tokens=(),
        golden=Golden(prompt=(1,), tokens=(1,), logits=(0.0,), tolerance=1.0),
        publisher=PUBLISHER.peer_id,
    )
    return Manifest.parse(made.sign(PUBLISHER).to_json())


def floor(sessions: list[ort.InferenceSession], rows: int, calls: int) -> list[float]:
    """Seconds of bare ``run()`` calls on the calling thread, the experts in turn."""
    x = np.random.default_rng(rows).standard_normal((rows, HIDDEN), np.float32)
    times = []
    for n in range(calls):
        start = time.perf_counter()
        sessions[n % len(sessions)].run(None, {"x": x})
        times.append(time.perf_counter() - start)
    return times


def _file(path: str) -> ModelFile:
    digest = sha256(b"x").hexdigest()
    return ModelFile(path=path, sha256=digest, size_bytes=1, chunks=(digest,))
