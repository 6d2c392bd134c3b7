"""The measured hardware is plausible and travels in an advert; a broken GPU tool is no fault."""

import msgspec

from dmoe import hardware
from p2p.core import codec
from p2p.core.advert import Advert, Gpu, Hardware


def test_this_machine_is_measured():
    found = hardware.measure()
    assert found.cpu
    assert found.cores >= 1
    assert found.ram_bytes > 1 << 26
    assert found.expert_kflop_per_s > 1000
    assert found.memory_bytes_per_s > 1 << 26
    advert = Advert(peer_id="p", seq=1, expires_ms=1, hardware=found)
    assert codec.decode(Advert, codec.encode(advert), bytes_max=1 << 16).hardware == found


def test_gpu_lines_are_read_and_garbage_is_left_out():
    text = "NVIDIA A100-SXM4-80GB, 81920\nodd, name, 16\n[N/A]\nX, [N/A]\n, 5\n"
    assert hardware.parse_gpus(text) == (Gpu("NVIDIA A100-SXM4-80GB", 81920 << 20), Gpu("odd, name", 16 << 20))


def test_a_failing_or_missing_tool_means_no_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.gpus() == ()
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    assert hardware.gpus() == ()
    tool.write_text("#!/bin/sh\necho 'GPU, 1'\n")
    assert hardware.gpus() == (Gpu("GPU", 1 << 20),)


def test_unknown_hardware_is_still_an_advert():
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Hardware()), type=Hardware) == Hardware()
