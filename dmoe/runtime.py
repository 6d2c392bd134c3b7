"""ONNX Runtime sessions over a model's weights: an expert shard, the trunk's pieces, the fused model.

Owns: which device and how many threads run what, and the memory that sessions read and write. Does not own: the
layer loop (``dmoe/layers``), operators (``dmoe/graphs``) or files (``dmoe/store``).

Invariants:
1. Weights stay in the shard files' memory maps: ONNX Runtime packs its own copy at load, then the pages are given
   back, so weights are in memory once.
2. Expert sessions have one thread and no pool: a worker's own threads run many of them side by side. No pool spins
   for long: the processes of a swarm share their cores.
3. :class:`ExpertShard` is safe to use from several threads; ``run`` releases the GIL.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from config.errors import LocalError
from dmoe.core import linear
from dmoe.core.linear import Linear
from dmoe.core.manifest import Architecture, Manifest, Shard
from dmoe.graphs import expert_graph
from dmoe.operators import Graph, onnx_type
from dmoe.shardfile import ShardFile
from dmoe.weights import LayerWeights
from dmoe.weights import layer_weights as layer_weights

# both are read by ONNX Runtime itself: the first when it is imported, the second when an attention operator is made.
# The tiled attention of the CPU provider is slower here at every length (one row of 300 keys: 205 instead of 82 us).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")

import onnxruntime as ort

Array = NDArray[Any]
FloatRows = NDArray[np.float32]
IntRows = NDArray[np.int32]

_FUSED_SPIN_US = 50
"""Longer than the gaps between one pass's operators, too short to take a core from a neighbour: spinning without end
is 10 % faster on idle cores and half as fast on shared ones."""

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"

VERSION_MIN, VERSION_MIN_CUDA = (1, 32), (1, 31)
"""Of ONNX Runtime: older ones have known faults in what they read. The build for CUDA is published later."""


def check_version() -> None:
    """Raise LocalError if ONNX Runtime is too old."""
    found = tuple(int(part) for part in re.findall(r"\d+", ort.__version__)[:2])
    needed = VERSION_MIN_CUDA if _CUDA in ort.get_available_providers() else VERSION_MIN
    if found < needed:
        wanted = ".".join(map(str, needed))
        message = f"ONNX Runtime {ort.__version__} is too old: {wanted} or later is needed"
        raise LocalError("local", message, f"pip install 'onnxruntime>={wanted}'")


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """``auto`` takes a GPU for experts if there is one and never fails without. ``threads``: 0 is all cores. Whoever
    runs models makes one first: it checks the version of ONNX Runtime, and raises LocalError if it is too old."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        check_version()

    @property
    def thread_count(self) -> int:
        """Threads in numbers."""
        return self.threads or len(os.sched_getaffinity(0))

    def providers(self) -> list[str]:
        """Execution providers for experts, best first. Raises LocalError if a GPU is demanded and there is none."""
        available = _CUDA in ort.get_available_providers()
        if self.device == "cuda" and not available:
            raise LocalError(
                "local", "device = cuda, but no CUDA runtime was found", 'install rios[gpu], or use "auto"'
            )
        return [_CUDA, _CPU] if available and self.device != "cpu" else [_CPU]


class ShardFiles(Protocol):
    """Where shards are read from: :class:`dmoe.store.ModelStore`, or an import's folder."""

    def open_shard(self, manifest: Manifest, shard: Shard) -> Sequence[ShardFile]:
        """A shard's files, mapped."""


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """A loaded graph. ONNX Runtime borrows the weights that it did not pack: they stay alive with it."""

    raw: Any
    weights: Mapping[str, Array]


POOL_BYTES_MIN = 4 << 20
"""A matrix below this size is multiplied sooner than a sleeping pool wakes up (one row: 0.30 instead of 0.34 ms)."""


class Binding:
    """A session with fixed memory for every input and output: running it allocates nothing of ours."""

    __slots__ = ("_arrays", "_binding", "_run")

    def __init__(self, session: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        binding = session.raw.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._arrays = (*inputs.values(), *outputs.values())  # the session writes there: keep them alive
        # the wrapper around these two costs as much as a small operator, 150 times a token
        self._binding = binding._iobinding
        self._run = session.raw._sess.run_with_iobinding

    def run(self) -> None:
        """Read the inputs, write the outputs."""
        self._run(self._binding, None)


def open_session(graph: Graph, *, threads: int, providers: Sequence[str] = (_CPU,), spin_us: int = 0) -> Session:
    """A session over a graph of our own. Raises LocalError if this machine cannot make one."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin_us else "0")
    if spin_us:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
    try:
        values = [_value(weight) for weight in graph.weights.values()]
        options.add_external_initializers(list(graph.weights), values)
        again = int(len(providers) > 1)  # the library's second try, on the CPU; it tells of it on stdout
        raw = ort.InferenceSession(graph.model, options, providers=list(providers), enable_fallback=again)
    except Exception as error:
        if isinstance(error, MemoryError) or "alloc" in str(error):  # the library says bad_alloc in several ways
            hint = "free some memory, or use another route"
            raise LocalError("local", "there is not enough memory to load the model", hint) from error
        raise LocalError("local", f"ONNX Runtime cannot load a graph: {str(error)[:300]}") from error
    return Session(raw, graph.weights)


def _value(weight: Array) -> ort.OrtValue:
    """A weight where it lies."""
    if weight.dtype == np.uint16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(weight, onnx_type(weight))
    return ort.OrtValue.ortvalue_from_numpy(weight)


class ExpertShard:
    """The experts of one shard, ready to run."""

    def __init__(self, manifest: Manifest, shard: Shard, store: ShardFiles, options: RuntimeOptions) -> None:
        assert shard.kind == "expert"
        self.manifest = manifest
        self.shard = shard
        self.ram_bytes = shard.ram_bytes
        self._experts = shard.experts
        self._weighted = manifest.architecture.router.kind != "all"
        self._hidden = manifest.architecture.hidden
        self._files = store.open_shard(manifest, shard)
        self._sessions: dict[tuple[int, int], Expert] = {}
        tensors = merged(self._files)
        providers = options.providers()
        for layer in manifest.layers_of(shard):
            for expert in shard.experts:
                self._sessions[layer, expert] = open_expert(manifest, tensors, layer, expert, providers)
        self._warm_up()
        release(self._files)

    def partial(
        self, layer: int, h: FloatRows, experts: IntRows | None = None, weights: FloatRows | None = None
    ) -> FloatRows:
        """The unrounded partial sum of this shard's sum group: ``f32[N, H]``, in expert order.

        ``h``: rows as rounded for the wire. ``experts i32[N, k]`` and ``weights f32[N, k]`` are the router's choice,
        None where every expert is always chosen. A row that chose no expert of the group gets 0.
        """
        assert (experts is not None) == self._weighted
        run = self._sessions
        return partial_sum(self._experts, h, experts, weights, lambda expert, rows: run[layer, expert].run(rows))

    def close(self) -> None:
        """Free the sessions and their memory."""
        self._sessions.clear()
        self._files = []

    def _warm_up(self) -> None:
        row = np.zeros((1, self._hidden), np.float32)
        for expert in self._sessions.values():
            expert.run(row)


def partial_sum(
    members: Sequence[int],
    h: FloatRows,
    experts: IntRows | None,
    weights: FloatRows | None,
    run: Callable[[int, FloatRows], FloatRows],
) -> FloatRows:
    """A sum group's share ``f32[N, H]`` in expert order; without a choice every one of ``members``, unweighted. ``run``
    gives an array that may be written to."""
    if experts is not None and weights is not None:
        return weighted_sum(members, h, experts, weights, run)
    total = run(members[0], h)
    for expert in members[1:]:
        total += run(expert, h)
    return total


def weighted_sum(
    members: Sequence[int],
    h: FloatRows,
    experts: IntRows,
    weights: FloatRows,
    run: Callable[[int, FloatRows], FloatRows],
) -> FloatRows:
    """``f32[N, H]``: per row the sum of ``weight * run(expert, row)`` over those of ``members`` that it chose, in their
    order; 0 for a row that chose none. ``run`` gives an array that may be written to."""
    total: FloatRows | None = None
    for expert in members:
        rows, choices = np.nonzero(experts == expert)
        if not rows.size:
            continue
        # every row once: then nothing has to be gathered and scattered
        whole = rows.size == len(h) and bool((rows == np.arange(len(h))).all())
        y = run(expert, h if whole else h[rows])
        y *= weights[rows, choices, None]
        if total is None:
            total = np.zeros(h.shape, np.float32)
        if whole:
            total += y
        else:
            total[rows] += y
    return np.zeros(h.shape, np.float32) if total is None else total


def open_expert(
    manifest: Manifest, tensors: Mapping[str, Array], layer: int, expert: int, providers: Sequence[str] = (_CPU,)
) -> "Expert":
    """One expert out of its shard's tensors."""
    arch = manifest.architecture
    gate_up, down = expert_weights(arch, tensors, layer, expert)
    graph = expert_graph(gate_up, down, arch.traits)
    return Expert(open_session(graph, threads=1, providers=providers), arch.hidden)


class Expert:
    """One expert's session; single rows go through bindings that are kept, one per thread that needs one at a time."""

    __slots__ = ("_free", "_hidden", "_session")

    def __init__(self, session: Session, hidden: int) -> None:
        self._session = session
        self._hidden = hidden
        self._free: list[tuple[FloatRows, FloatRows, Binding]] = []

    def run(self, h: FloatRows) -> FloatRows:
        """``y f32[N, H]`` of ``h``; the caller may write to it."""
        if len(h) != 1:
            out = np.empty((len(h), self._hidden), np.float32)
            if len(h):
                Binding(self._session, {"h": np.ascontiguousarray(h, np.float32)}, {"y": out}).run()
            return out
        try:
            row, y, binding = self._free.pop()
        except IndexError:  # first use, or another thread is using the one there is
            row, y = np.empty((1, self._hidden), np.float32), np.empty((1, self._hidden), np.float32)
            binding = Binding(self._session, {"h": row}, {"y": y})
        row[:] = h
        binding.run()
        result = y.copy()
        self._free.append((row, y, binding))
        return result


def open_files(manifest: Manifest, store: ShardFiles, shards: Sequence[Shard]) -> list[ShardFile]:
    """The files of several shards, mapped; one that several of them list, once."""
    files = {file.path: file for shard in shards for file in store.open_shard(manifest, shard)}
    return list(files.values())


def merged(files: Sequence[ShardFile]) -> dict[str, Array]:
    """The tensors of several files under their names."""
    return {name: tensor for file in files for name, tensor in file.tensors.items()}


def release(files: Sequence[ShardFile]) -> None:
    """Give pages back that were only read to be packed."""
    for file in files:
        file.release_pages()


def expert_weights(arch: Architecture, tensors: Mapping[str, Array], layer: int, expert: int) -> tuple[Linear, Linear]:
    """gate|up ``[2 * intermediate, hidden]`` and down ``[hidden, intermediate]`` of an expert."""
    name, bias = f"layer.{layer}.expert.{expert}", arch.traits.expert_bias
    return (
        linear.find(tensors, f"{name}.gate_up", 2 * arch.intermediate, arch.hidden, bias=bias),
        linear.find(tensors, f"{name}.down", arch.hidden, arch.intermediate, bias=bias),
    )


def attention_threads(layers: Iterable[LayerWeights], options: RuntimeOptions) -> int:
    """For the attention pieces of some layers: one if there is a layer so small that it is faster without a pool."""
    smallest = min(weights.size_bytes for weights in layers)
    return options.thread_count if smallest >= POOL_BYTES_MIN else 1


def head_weights(arch: Architecture, tensors: Mapping[str, Array]) -> tuple[Array, Linear]:
    """The last norm and the head; a tied head is the embedding."""
    head = linear.find(tensors, "embed" if arch.tie_embeddings else "head", arch.vocab, arch.hidden)
    return linear.vector(tensors, "norm", arch.hidden), head


def smoke(options: RuntimeOptions) -> None:
    """One small expert on the device of ``options``. Raises LocalError if ONNX Runtime is too old, cannot run or
    computes wrongly."""
    check_version()
    gate_up = Linear({"w": np.ones((64, 32), np.float32)})
    down = Linear({"w": np.ones((32, 32), np.float32)})
    session = open_session(expert_graph(gate_up, down), threads=1, providers=options.providers())
    found = Expert(session, 32).run(np.ones((1, 32), np.float32))
    silu = 32.0 / (1.0 + float(np.exp(-32.0)))
    if not np.allclose(found, 32 * silu * 32):
        raise LocalError("local", "ONNX Runtime computes wrongly on this machine", "reinstall onnxruntime")
