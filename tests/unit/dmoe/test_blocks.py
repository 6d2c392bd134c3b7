"""GGUF's block formats: every one is stored and run as the numbers that the gguf package reads from it."""

import numpy as np
import pytest

from dmoe.core import linear
from dmoe.core.linear import Linear, alike, join_rows
from dmoe.core.variant import PLAIN, Variant
from dmoe.graphs import expert_graph
from dmoe.importer.blocks import BLOCK_TYPES, block_size, transcode
from dmoe.importer.quantise import convert, quantise_int4, quantise_int8
from dmoe.importer.sources import GgufSource
from dmoe.runtime import Binding, open_session
from dmoe.shardfile import ShardFile, to_bytes
from tests.unit.dmoe.blocks_kit import dequantised, random_blocks
from tests.unit.dmoe.model_kit import feed, load, made, numpy_logits

IDS = [int(token) for token in np.random.default_rng(7).integers(1, 250, 24)]


def run(gate_up, down, h, traits=PLAIN):
    session = open_session(expert_graph(gate_up, down, traits), threads=1)
    y = np.empty((len(h), down.rows), np.float32)
    Binding(session, {"h": np.ascontiguousarray(h)}, {"y": y}).run()
    return y


def expert_of(gate_up, down, h):
    """The same in fp64."""
    gate, up = np.split(h.astype(np.float64) @ gate_up.astype(np.float64).T, 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * up) @ down.astype(np.float64).T


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_every_format_is_stored_without_loss(kind):
    blocks = random_blocks(kind)
    wanted = dequantised(kind, blocks)
    layer = transcode(kind, blocks)
    error = np.abs(layer.dequantised() - wanted).reshape(len(wanted), -1, block_size(kind)).max(axis=-1)
    if "c" in layer.parts:  # scale and offset are added in another order
        terms = np.abs(layer.parts["c"].T) + 16 * np.abs(layer.parts["s"])
        assert (error <= np.spacing(terms).reshape(*error.shape, -1).max(axis=-1)).all()
    else:
        assert not error.any()
    assert linear.find(layer.tensors("x"), "x", *wanted.shape).form == layer.form


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_every_format_runs_and_rows_do_not_depend_on_their_batch(kind):
    gate_up, down = random_blocks(kind, 512, 256, 1, 0.06), random_blocks(kind, 256, 256, 2, 0.06)
    layers = transcode(kind, gate_up), transcode(kind, down)
    h = np.random.default_rng(5).standard_normal((9, 256)).astype(np.float32)
    got = run(*layers, h)
    wanted = expert_of(dequantised(kind, gate_up), dequantised(kind, down), h)
    assert np.abs(got - wanted).std() < 0.03 * wanted.std()  # the operator rounds activations to 8 bits
    single = np.concatenate([run(*layers, h[row : row + 1]) for row in range(9)])
    threes = np.concatenate([run(*layers, h[row : row + 3]) for row in range(0, 9, 3)])
    assert single.tobytes() == threes.tobytes() == got.tobytes()


@pytest.mark.parametrize(("kinds", "form"), [(("Q4_1", "Q8_0"), 32), (("Q4_K", "Q6_K"), 16), (("Q3_K", "Q5_0"), 16)])
def test_formats_that_are_joined_stay_codes_and_lose_nothing(kinds, form):
    blocks = [random_blocks(kind, 32, 256, seed) for seed, kind in enumerate(kinds)]
    layers = [transcode(kind, data) for kind, data in zip(kinds, blocks, strict=True)]
    joined = join_rows(alike(layers))
    assert (joined.bits, joined.block) == (8, form)
    assert np.array_equal(joined.dequantised(), np.concatenate([layer.dequantised() for layer in layers]))


def test_a_block_format_and_floats_are_joined_as_floats():
    blocks = transcode("Q8_0", random_blocks("Q8_0"))
    halves = Linear({"h": np.ones((2, 512), np.float16)})
    joined = join_rows(alike([blocks, halves]))
    assert joined.dequantised().tobytes() == np.concatenate([blocks.dequantised(), halves.dequantised()]).tobytes()


@pytest.mark.parametrize("kind", ["Q6_K", "Q2_K", "Q5_K", "Q8_0"])
def test_columns_are_cut_at_whole_blocks(kind):
    layer = transcode(kind, random_blocks(kind))
    cut = linear.join_columns([layer.take_columns(slice(at, at + 128)) for at in range(0, 512, 128)])
    assert all(part.tobytes() == layer.parts[key].tobytes() for key, part in cut.parts.items())


def mixed(name):
    """The types of a Q4_K_M file, and of formats with 16 weights to a scale."""
    if "attn_v" in name or "down" in name:
        return "Q6_K"
    return "Q5_K" if "up" in name else "Q3_K" if "attn_k" in name else "Q4_K"


@pytest.mark.parametrize("experts", [0, 6])
async def test_a_file_of_mixed_formats_gives_its_own_logits(tmp_path, experts):
    store, manifest = await made(tmp_path, kind=mixed, hidden=256, experts=experts)
    runner = load(store, manifest)
    got = await feed(runner, await runner.open(60), IDS)
    expected = numpy_logits(GgufSource(tmp_path / "tiny.gguf"), manifest, IDS)
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.995  # activations are rounded to 8 bits
    assert manifest.quantisation == "source"


def test_int4_finds_a_grid_that_is_there():
    source = transcode("Q4_1", random_blocks("Q4_1", 64, 512, 1, 0.05))
    again = quantise_int4(source.dequantised())
    error = np.abs(again.dequantised() - source.dequantised())
    assert (error > 1e-6).mean() < 0.02  # a block that does not use its whole grid may fit another one


def test_int4_errs_less_than_rounding_to_the_range():
    weights = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
    blocks = weights.reshape(256, 32, 32)
    low, step = blocks.min(-1, keepdims=True), np.ptp(blocks, axis=-1, keepdims=True) / 15
    plain = np.rint((blocks - low) / step) * step + low
    found = quantise_int4(weights).dequantised().reshape(blocks.shape)
    assert np.square(found - blocks).mean() < 0.85 * np.square(plain - blocks).mean()


@pytest.mark.parametrize("weights", [np.zeros((2, 64)), np.full((2, 64), -3.0), np.eye(64)])
def test_int4_keeps_blocks_that_need_no_grid(weights):
    layer = quantise_int4(weights.astype(np.float32))
    assert np.abs(layer.dequantised() - weights).max() < 1e-6


@pytest.mark.parametrize(("quantisation", "suffixes"), [("fp16", ("h",)), ("int8", ("q8", "s")), ("fp32", ("w",))])
def test_a_format_can_be_chosen(quantisation, suffixes):
    layer = transcode("Q5_K", random_blocks("Q5_K", 8, 256, 1, 0.05))
    found = convert(layer, quantisation)
    assert found.form.suffixes == suffixes
    weights = layer.dequantised()
    assert np.abs(found.dequantised() - weights).max() <= np.abs(weights).max() / 250
    assert convert(layer, "source") is layer
    eight, four = quantise_int8(layer.dequantised()), quantise_int4(layer.dequantised())
    assert convert(eight, "int8") is eight
    assert convert(four, "int4") is four


def test_what_half_floats_cannot_hold_stays_float():
    assert convert(Linear({"w": np.full((2, 32), 1e6, np.float32)}), "fp16").form.suffixes == ("w",)


@pytest.mark.parametrize("suffix", ["h", "b"])
def test_floats_of_16_bits_are_stored_as_they_are_and_run_as_f32(tmp_path, suffix):
    floats = (np.arange(16 * 32, dtype=np.float32) % 251 - 120).reshape(16, 32)
    bits = floats.astype(np.float16) if suffix == "h" else (floats.view(np.uint32) >> 16).astype(np.uint16)
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(to_bytes(Linear({suffix: bits}).tensors("down"))))
    down = linear.find(ShardFile(path).tensors, "down", 16, 32)
    assert down.dequantised().tobytes() == floats.tobytes()
    gate_up = np.random.default_rng(4).standard_normal((64, 16)).astype(np.float32)
    h = np.random.default_rng(5).standard_normal((3, 16)).astype(np.float32)
    assert (
        run(Linear({"w": gate_up}), down, h).tobytes()
        == run(Linear({"w": gate_up}), Linear({"w": floats}), h).tobytes()
    )


def gpt_oss_expert(gate_up, down, biases, h):
    """The clamped activation in fp64 (transformers' ``GptOssExperts``)."""
    gate, up = np.split(h.astype(np.float64) @ gate_up.astype(np.float64).T + biases[0], 2, axis=1)
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    return (up + 1) * gate / (1 + np.exp(-1.702 * gate)) @ down.astype(np.float64).T + biases[1]


@pytest.mark.parametrize("kind", ["F32", "MXFP4", "Q4_0", "Q4_1", "Q5_K"])
def test_an_expert_with_biases_and_the_clamped_activation(kind):
    random = np.random.default_rng(9)
    biases = [random.standard_normal(size).astype(np.float32) for size in (512, 256)]
    h = 3 * random.standard_normal((9, 256)).astype(np.float32)
    if kind == "F32":
        layers = [Linear({"w": random.standard_normal(shape).astype(np.float32)}) for shape in ((512, 256), (256, 256))]
    else:
        layers = [transcode(kind, random_blocks(kind, rows, 256, 1, 0.06)) for rows in (512, 256)]
    gate_up, down = (layer.with_bias(bias) for layer, bias in zip(layers, biases, strict=True))
    traits = Variant(activation="clamped", expert_bias=True)
    got = run(gate_up, down, h, traits)
    wanted = gpt_oss_expert(gate_up.dequantised(), down.dequantised(), biases, h)
    assert np.abs(got - wanted).std() < (1e-5 if kind == "F32" else 0.03) * wanted.std()
    single = np.concatenate([run(gate_up, down, h[row : row + 1], traits) for row in range(9)])
    assert single.tobytes() == got.tobytes()
    found = linear.find(down.tensors("x"), "x", 256, 256, bias=True)
    assert found.form == down.form
