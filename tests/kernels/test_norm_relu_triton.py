"""Batch norm and ReLU in one operation: against float64 in Triton's interpreter, compiled for cards, and, on one, itself.

Triton decides when it is imported whether kernels are interpreted, so the tests marked `interpreted` run in a process of
their own, see test_interpreted.py. By hand:
`TRITON_INTERPRET=1 python -m pytest tests/kernels/test_norm_relu_triton.py`.
"""

import importlib.util
import os
import sys
from types import SimpleNamespace

import processes
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from p2w.errors import UserError

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's own process")
compiled = pytest.mark.skipif(
    INTERPRETING or importlib.util.find_spec("triton") is None, reason="needs triton, not interpreting"
)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Half a unit of the last place relative to the largest value; the interpreter cuts bfloat16 off where a card rounds.
STEP = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0 ** -(7 if INTERPRETING else 8)}


def case(shape, dtype=torch.float32, offset=0.0, seed=0, device="cpu"):
    """x and the output's gradient (channels last), weight, bias, running statistics, shift; float32 where not x."""
    draw = torch.Generator().manual_seed(seed)
    channels = shape[1]

    def normal(*of):
        return torch.randn(of, generator=draw)

    spread = normal(1, channels, 1, 1, 1).exp()
    x, dy = ((normal(*shape) + offset) * spread).to(dtype), normal(*shape).to(dtype)
    x, dy = (one.to(device).contiguous(memory_format=torch.channels_last_3d) for one in (x, dy))
    vectors = [
        normal(channels),
        normal(channels),
        normal(channels),
        normal(channels).exp(),
        normal(channels),
    ]
    weight, bias, mean, var, shift = (one.to(device) for one in vectors)
    return SimpleNamespace(x=x, dy=dy, weight=weight, bias=bias, mean=mean, var=var, shift=shift)


def run(given, *, shift=True, reduce=None, momentum=0.1, eps=1e-5):
    """Output, gradients and running statistics of the kernels."""
    from p2w.kernels.norm_relu_triton import norm_relu

    x, weight, bias = (one.clone().requires_grad_() for one in (given.x, given.weight, given.bias))
    mean, var = given.mean.clone(), given.var.clone()
    y = norm_relu(
        x, weight, bias, mean, var,
        shift=given.shift if shift else None, momentum=momentum, eps=eps, reduce=reduce,
    )  # fmt: skip
    y.backward(given.dy)
    assert y.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last_3d)
    return SimpleNamespace(y=y.detach(), dx=x.grad, dweight=weight.grad, dbias=bias.grad, mean=mean, var=var)


def naive(given, *, shift=True, momentum=0.1, eps=1e-5, passes=None):
    """The same in float64, written out; the gradient is autograd's. Of millions of values a few lie so close to zero that
    rounding decides which side: `passes` (bool, like x) then says what the ReLU let through."""
    x, weight, bias = (one.detach().double().requires_grad_() for one in (given.x, given.weight, given.bias))
    dims, count = (0, 2, 3, 4), given.x.numel() // given.x.shape[1]
    mean = x.mean(dims)
    var = ((x - mean.view(1, -1, 1, 1, 1)) ** 2).mean(dims)
    scale, start = (one.view(1, -1, 1, 1, 1) for one in (weight / (var + eps).sqrt(), bias))
    y = (x - mean.view(1, -1, 1, 1, 1)) * scale + start
    if passes is None:
        passes = y > 0
    assert (y[passes != (y > 0)].abs() < 1e-4).all()
    y = torch.where(passes, y, 0.0)
    y.backward(given.dy.double())
    follow = mean + given.shift.double() if shift else mean
    return SimpleNamespace(
        y=y.detach(),
        dx=x.grad,
        dweight=weight.grad,
        dbias=bias.grad,
        mean=((1 - momentum) * given.mean + momentum * follow).detach(),
        var=((1 - momentum) * given.var + momentum * var * count / (count - 1)).detach(),
    )


def compare(got, expected, dtype, slack=1.0):
    """Maps to half a unit of their type's last place, vectors to float32's; each relative to its largest value."""
    for name, want in vars(expected).items():
        found = getattr(got, name).double()
        step = STEP[dtype] if name in ("y", "dx") else 2.0**-20
        assert (found - want).abs().max() <= slack * step * want.abs().max().clamp(min=1e-3), name


@interpreted
@pytest.mark.parametrize("shape, dtype", [
    ((2, 1, 3, 5, 7), torch.float32),
    ((2, 3, 3, 5, 7), torch.bfloat16),
    ((1, 48, 3, 5, 7), torch.float32),
    ((3, 48, 1, 2, 1), torch.float16),
    ((2, 64, 3, 5, 7), torch.bfloat16),
    ((2, 130, 2, 3, 5), torch.float32),  # two tiles of channels, the second nearly empty
    ((1, 512, 2, 2, 3), torch.bfloat16),
])  # fmt: skip
def test_values_gradients_and_running_statistics_against_float64(shape, dtype):
    given = case(shape, dtype)
    compare(run(given), naive(given), dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_programs_that_take_many_tiles_each(monkeypatch, dtype):
    from p2w.kernels import norm_relu_triton

    monkeypatch.setattr(norm_relu_triton, "PROGRAMS", 2)
    given = case((1, 36, 5, 10, 11), dtype, offset=3)
    cut = norm_relu_triton.TileGrid(550, 36, norm_relu_triton.MOMENTS)
    assert (cut.programs, cut.tiles) == (2, 5)
    got = run(given, shift=False)
    compare(got, naive(given, shift=False), dtype)
    again = run(given, shift=False)
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(got).items())


@interpreted
def test_two_million_rows_a_hundred_deviations_from_zero_keep_their_digits(monkeypatch):
    from p2w.kernels import norm_relu_triton

    # Fewer steps of the slow interpreter; one program has 64 times the rows that it has on a card.
    for name, value in {"MOMENTS": 2**15, "OUTPUT": 2**19, "PROGRAMS": 2}.items():
        monkeypatch.setattr(norm_relu_triton, name, value)
    given = case((1, 1, 32, 256, 256), torch.bfloat16, offset=100)
    mean, var = torch.zeros(1), torch.zeros(1)
    norm_relu_triton.norm_relu(given.x, given.weight, given.bias, mean, var, momentum=1.0, eps=1e-5)
    exact = given.x.double()
    assert abs(mean.item() / exact.mean().item() - 1) < 1e-7
    assert abs(var.item() / exact.var().item() - 1) < 1e-6


@interpreted
def test_a_constant_channel_and_numbers_that_are_none():
    given = case((2, 4, 3, 5, 7))
    given.x[:, 1] = 1000.0
    given.x[0, 2, 0, 0, 0] = torch.nan
    got = run(given)
    assert got.var[1].item() == pytest.approx(0.9 * given.var[1].item(), rel=2e-7)  # no variance at all
    kept = max(given.bias[1].item(), 0)
    assert (got.y[:, 1] - kept).abs().max() < 1e-6 and got.dx[:, 1].isfinite().all()
    assert got.y[:, 2].isnan().all() and got.dx[:, 2].isnan().all()  # and does not turn into a zero
    assert got.y[:, [0, 1, 3]].isfinite().all()


def halves(given, rows):
    """What two ranks hold of a batch: `rows` samples and the rest."""
    parts = slice(None, rows), slice(rows, None)
    return [SimpleNamespace(**{**vars(given), "x": given.x[part], "dy": given.dy[part]}) for part in parts]


def check_ranks(given, found, dtype, *, momentum=0.1, slack=1.0):
    """Two ranks' results are those of the whole batch; gradients of weight and bias are shares that add up."""
    expected = naive(given, momentum=momentum)
    together = SimpleNamespace(
        y=torch.cat([one.y for one in found]),
        dx=torch.cat([one.dx for one in found]),
        dweight=found[0].dweight + found[1].dweight,
        dbias=found[0].dbias + found[1].dbias,
        mean=found[0].mean,
        var=found[0].var,
    )
    compare(together, expected, dtype, slack)
    assert torch.equal(found[0].mean, found[1].mean) and torch.equal(found[0].var, found[1].var)


@interpreted
@pytest.mark.parametrize("offset", [0, 100])
def test_two_ranks_of_unequal_size_are_one_with_the_whole_batch(offset):
    """Each rank first records what it would send, then receives the sum: no process group needed."""
    given = case((5, 6, 3, 5, 7), offset=offset)
    ranks = halves(given, 2)
    sent = [[], []]
    for rank, part in enumerate(ranks):
        run(part, reduce=lambda packet, rank=rank: sent[rank].append(packet.clone()))
    assert [len(one) for one in sent] == [2, 2]  # one sum forward, one backward
    forward = sent[0][0] + sent[1][0]
    own = []
    for part in ranks:
        packets = iter([forward])
        run(part, reduce=lambda packet, packets=packets: summed(packet, packets, own))
    backward = own[0] + own[1]
    found = []
    for part in ranks:
        packets = iter([forward, backward])
        found.append(
            run(part, reduce=lambda packet, packets=packets: summed(packet, packets, own), momentum=1.0)
        )
    # Float32 knows a mean a hundred deviations from zero to 100 * 2^-24 deviations; that much the output is off.
    check_ranks(given, found, torch.float32, momentum=1.0, slack=1.0 if offset == 0 else 30.0)
    exact = given.x.double().var((0, 2, 3, 4))
    assert (found[0].var / exact - 1).abs().max() < (5e-7 if offset == 0 else 1e-5)


def summed(packet, packets, own):
    """Replace what a rank sends by the next of the sums, while there is one; then keep what it sends."""
    total = next(packets, None)
    if total is None:
        own.append(packet.clone())
    else:
        packet.copy_(total)


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = halves(case((5, 6, 3, 5, 7), torch.bfloat16), 2)[rank]
    torch.save(vars(run(part, reduce=dist.all_reduce)), folder / f"{rank}.pt")
    dist.destroy_process_group()


@interpreted
def test_two_processes(tmp_path):
    mp.start_processes(one_rank, (tmp_path,), nprocs=2, start_method="fork")
    found = [SimpleNamespace(**torch.load(tmp_path / f"{rank}.pt")) for rank in range(2)]
    check_ranks(case((5, 6, 3, 5, 7), torch.bfloat16), found, torch.bfloat16)


@interpreted
def test_a_rank_without_a_sample_takes_part():
    given = case((3, 6, 3, 5, 7))
    full, empty = halves(given, 3)
    sent = []
    alone = run(full, reduce=lambda packet: sent.append(packet.clone()))
    packets = iter(sent)
    others = run(empty, reduce=lambda packet: packet.add_(next(packets)))  # what it adds to is zero
    assert others.y.shape == others.dx.shape == (0, 6, 3, 5, 7)
    assert not others.dweight.any() and not others.dbias.any()
    assert torch.equal(others.mean, alone.mean) and torch.equal(others.var, alone.var)
    compare(alone, naive(given), torch.float32)


@interpreted
def test_gradients_only_where_they_are_asked_for_and_other_memory_formats():
    from p2w.kernels.norm_relu_triton import norm_relu

    given = case((2, 5, 2, 3, 4))
    expected = run(given)
    weight, bias = (one.clone().requires_grad_() for one in (given.weight, given.bias))
    y = norm_relu(
        given.x.contiguous(), weight, bias, given.mean, given.var,
        shift=given.shift, momentum=0.1, eps=1e-5,
    )  # fmt: skip
    y.backward(given.dy.contiguous())
    assert torch.equal(y, expected.y) and torch.equal(weight.grad, expected.dweight)
    assert torch.equal(bias.grad, expected.dbias) and torch.equal(given.mean, expected.mean)


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(2, 3, 4, 5)}, r"x must be \(B, C, D, H, W\)"),
    ({"x": torch.zeros(2, 3, 4, 5, 6, dtype=torch.float64)}, r"got \(2, 3, 4, 5, 6\) torch.float64"),
    ({"weight": torch.zeros(4)}, r"contiguous \(3,\) float32 on cpu, got \(4,\)"),
    ({"bias": torch.zeros(3, dtype=torch.bfloat16)}, r"got \(3,\) torch.bfloat16 on cpu"),
    ({"x": torch.zeros(1, 3, 1, 1, 1)}, "more than one value per channel"),
])  # fmt: skip
def test_what_cannot_be_normalised_is_refused(change, message):
    pytest.importorskip("triton")
    from p2w.kernels.norm_relu_triton import norm_relu

    given = {**vars(case((2, 3, 4, 5, 6))), **change}
    tensors = (given[name] for name in ("x", "weight", "bias", "mean", "var"))
    with pytest.raises(UserError, match=message):
        norm_relu(*tensors, momentum=0.1, eps=1e-5)


COMPILE = """
import pathlib, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from p2w.kernels import norm_relu_triton as kernels

def check(kernel, constants, dtype, capability, registers):
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")} | {"momentum": "fp32", "eps": "fp32"}
    types |= {name: f"*{dtype}" for name in ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr") if name in types}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name == "rows"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    warps = 1 if kernel is kernels.combine_ranks_kernel else kernels.WARPS
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    code = pathlib.Path(sys.argv[1]) / "kernel.ptx"
    code.write_text(binary.asm["ptx"])
    name = re.search(r"[.]target (sm_\\w+)", binary.asm["ptx"])[1]
    tool = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", code, "-o", "/dev/null"]
    said = subprocess.run(tool, check=True, capture_output=True, text=True).stderr
    used = int(re.search(r"Used (\\d+) registers", said)[1])
    spilled = sum(map(int, re.search(r"(\\d+) bytes spill stores, (\\d+) bytes spill loads", said).groups()))
    name = f"{kernel.__name__} {constants['C']} {dtype} sm_{capability}: {used} registers, {spilled} bytes spilled"
    assert spilled == 0 and used <= registers, name
    if constants["C"] % 16 == 0:
        assert "ld.global.v4.b32" in binary.asm["ptx"] or registers > 128, f"{name}: reads less than 16 bytes at a time"

cases = (90, 64, "bf16"), (90, 3, "fp32"), (80, 512, "bf16")
for capability, channels, dtype in cases:
    names = ("MOMENTS", "OUTPUT", "SUMS", "INPUT_GRAD")
    cut = {name: kernels.TileGrid(2**21, channels, getattr(kernels, name)) for name in names}
    full = 128 if channels > 3 else 255  # two programs on a processor
    check(kernels.moments_kernel, cut["MOMENTS"].sizes, dtype, capability, full)
    check(kernels.output_kernel, cut["OUTPUT"].sizes | {"RUN": kernels.RUN}, dtype, capability, 80)
    check(kernels.sums_kernel, cut["SUMS"].sizes, dtype, capability, full)
    check(kernels.input_grad_kernel, cut["INPUT_GRAD"].sizes | {"RUN": kernels.RUN}, dtype, capability, 80)
    for ranks in (True, False):
        sizes = cut["MOMENTS"].combining | {"ROWS": cut["MOMENTS"].height, "RANKS": ranks}
        check(kernels.combine_moments_kernel, sizes, dtype, capability, 255)
    check(kernels.combine_ranks_kernel, {"C": channels, "BLOCK": 32}, dtype, capability, 255)
    check(kernels.combine_sums_kernel, cut["SUMS"].combining, dtype, capability, 255)
print("compiled")
"""


@pytest.mark.slow
@compiled
def test_compiles_for_cards_without_one_and_spills_nothing(tmp_path):
    run = processes.run(
        [sys.executable, "-c", COMPILE, str(tmp_path)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0 and "compiled" in run.stdout, run.stderr


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("shape, dtype", [
    ((4, 64, 32, 64, 64), torch.bfloat16),
    ((2, 48, 16, 33, 31), torch.float16),
    ((4, 512, 2, 4, 4), torch.float32),
])  # fmt: skip
def test_on_a_gpu_against_float64_in_six_launches_and_as_a_graph(shape, dtype):
    given = case(shape, dtype, offset=1, device="cuda")
    got = run(given)
    compare(got, naive(given, passes=got.y > 0), dtype, slack=2.0)
    again = run(given)
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(got).items())

    from p2w.kernels.norm_relu_triton import norm_relu

    x, weight, bias = (one.clone().requires_grad_() for one in (given.x, given.weight, given.bias))

    def step():
        y = norm_relu(x, weight, bias, given.mean, given.var, shift=given.shift, momentum=0.1, eps=1e-5)
        return y, *torch.autograd.grad(y, (x, weight, bias), given.dy)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(events) == 6 and all(event.name.endswith("_kernel") for event in events)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    graph.replay()
    for one, name in zip(made, ("y", "dx", "dweight", "dbias"), strict=True):
        assert torch.equal(one, getattr(got, name)), name
