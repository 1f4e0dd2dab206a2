"""Shuffling in small blocks on a GPU: the torch path's bits in Triton's interpreter, compiled for cards, and on one.

Triton decides when it is imported whether kernels are interpreted, so the tests marked `interpreted` run in a process of
their own, see test_interpreted.py. By hand:
`TRITON_INTERPRET=1 python -m pytest tests/kernels/test_local_shuffle_triton.py`.
"""

import importlib.util
import os
import sys

import processes
import pytest
import torch

from p2w import rng
from p2w.pretext.models_genesis import local_shuffle
from p2w.rng import SampleKeys

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's own process")
compiled = pytest.mark.skipif(
    INTERPRETING or importlib.util.find_spec("triton") is None, reason="needs triton, not interpreting"
)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@interpreted
@pytest.mark.parametrize("shape, count, dtype", [
    ((11, 21, 33), 70, torch.float32),  # odd edges, more blocks than a program takes
    ((8, 16, 24), 9, torch.bfloat16),  # blocks of one voxel along z and y; most voxels are in none
    ((20, 9, 40), 40, torch.int64),
])  # fmt: skip
def test_the_bits_of_the_torch_path(monkeypatch, shape, count, dtype):
    volumes = torch.rand(3, 1, *shape, generator=torch.Generator().manual_seed(0))
    volumes = (1000 * volumes).to(dtype)
    keys, chosen = SampleKeys(3, 1, torch.tensor([1, 2**40, 7])), torch.tensor([True, False, True])
    expected = local_shuffle(volumes, keys, 7, count, chosen)
    assert torch.equal(expected[1], volumes[1]) and not torch.equal(expected[2], volumes[2])
    monkeypatch.setattr(rng, "backend", lambda device: ("triton", "interpreted"))
    found = local_shuffle(volumes, keys, 7, count, chosen)
    assert found.dtype == dtype and torch.equal(found, expected)


COMPILE = """
import pathlib, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from p2w.kernels import sample_triton as kernels
from p2w.pretext import models_genesis as local_shuffle

types = dict.fromkeys(("draws_ptr", "seeds_ptr"), "*fp64") | {"chosen_ptr": "*i1", "last_ptr": "*i32"}
types |= dict.fromkeys(("volumes_ptr", "out_ptr"), "*fp32")
shape = {"N": 10_000, "D": 32, "H": 64, "W": 64}
own = {
    kernels.last_block_kernel: {"MOST_X": 8, "BLOCKS": kernels.BLOCKS},
    kernels.shuffle_kernel: {"ROUNDS": local_shuffle.ROUNDS, "ODD": local_shuffle._ODD, "VOXELS": kernels.VOXELS},
}
for kernel, sizes in own.items():
    constants = shape | sizes
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    code = pathlib.Path(sys.argv[1]) / "kernel.ptx"
    code.write_text(binary.asm["ptx"])
    name = re.search(r"[.]target (sm_\\w+)", binary.asm["ptx"])[1]
    tool = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", code, "-o", "/dev/null"]
    said = subprocess.run(tool, check=True, capture_output=True, text=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    assert int(re.search(r"Used (\\d+) registers", said)[1]) <= 128, said  # sixteen warps on a processor
print("compiled")
"""


@pytest.mark.slow
@compiled
def test_compiles_for_hopper_without_one_and_spills_nothing(tmp_path):
    run = processes.run(
        [sys.executable, "-c", COMPILE, str(tmp_path)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0 and "compiled" in run.stdout, run.stderr


@pytest.mark.gpu
@gpu
def test_on_a_gpu_the_bits_of_the_cpu():
    volumes = torch.rand(4, 1, 32, 64, 64, generator=torch.Generator().manual_seed(0))
    ids, chosen = torch.arange(4) * 7919, torch.tensor([True, False, True, True])
    expected = local_shuffle(volumes, SampleKeys(3, 1, ids), 7, 10_000, chosen)
    found = local_shuffle(volumes.cuda(), SampleKeys(3, 1, ids.cuda()), 7, 10_000, chosen.cuda())
    assert torch.equal(found.cpu(), expected)
