"""The fastest form that computes the same is taken, by all ranks, and taken again when the run goes on."""

import json
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import call
from torch import nn

from p2w.model import build_encoder
from p2w.model.decoder import EncoderDecoder
from p2w.model.forms import FOLDED, PLAIN, Formed, formed_modules, set_forms
from p2w.model.unet3d import UNet3dDecoder, folded_by_count
from p2w.train import isolated_layer
from p2w.train.form_choice import RECORD, choose_forms, read_form_record
from p2w.train.optim import Precision
from p2w.world import World


def wall_seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


CPU = torch.device("cpu")
FP32, BF16 = Precision("fp32", None, ""), Precision("bf16", torch.bfloat16, "")
WORLD = World(0, 1, 0, 1, "here", CPU, "test")
SHAPE = (4, 1, 8, 8, 8)


class Mixed(Formed):
    """x times a sum of weights, by adding 64 products one by one ("plain") or at once ("fast"); other forms are broken."""

    have = (PLAIN, "fast", "slow", "wrong", "broken", "counts")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 1))
        self.register_buffer("seen", torch.zeros(1))

    def possible_forms(self):
        return self.have

    def forms(self, device, dtype, samples):
        return tuple(form for form in self.have if form != "elsewhere")

    def formed(self, x):
        if self.form == "broken":
            raise ImportError("no C compiler\nand a page of its own")
        self.seen += 2 if self.form == "counts" else 1
        if self.form in ("fast", "elsewhere"):
            return x * self.weight.sum()
        out = sum(x * weight for weight in self.weight)
        out = out + sum(0 * x for _ in range(64)) if self.form == "slow" else out
        extra = x.detach() * (self.weight[0] - self.weight[0].detach())  # 0, but not its gradient
        return out + 0.3 * extra if self.form == "wrong" else out

    def forward(self, x):
        return self.formed(x)


def network(count=2, have=None):
    torch.manual_seed(0)
    model = nn.Sequential(*(Mixed() for _ in range(count)))
    for one in model:
        one.have = have or one.have
    return model


def choose(model, warned=None, **more):
    more = {
        "rule": "measure",
        "timer": wall_seconds,
        "precision": FP32,
        "world": WORLD,
        "shape": SHAPE,
    } | more
    said = [].append if warned is None else warned.append
    return choose_forms(model, more.pop("shape"), more.pop("precision"), more.pop("world"), said, **more)


@pytest.mark.parametrize("precision", [FP32, BF16])
def test_the_fastest_form_that_computes_the_same_is_taken(precision):
    model, warned = network(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    choice = choose(model, warned, precision=precision)
    assert choice.forms == {"0": "fast", "1": "fast"}
    assert {name: one.form for name, one in formed_modules(model)} == {"0": PLAIN, "1": PLAIN}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert choice.line.startswith("forms           fast in 2 of 2 modules, ")
    assert f"measured with 4 samples in {precision.name} on " in choice.line
    assert warned[0].startswith("form wrong differs from plain float32 by ")
    assert warned[1] == (
        "form broken does not run here (ImportError: no C compiler); it is left out, at some cost in speed"
    )
    assert (
        warned[2].startswith("form counts differs") and len(warned) == 3
    )  # each form once, not once a module
    times = choice.record["ms"]["0"]
    assert set(times) == {PLAIN, "fast", "slow"} and times["fast"] < times[PLAIN] < times["slow"]


def test_of_a_large_batch_a_few_samples_are_compared_and_each_distinct_module_is_timed_once(monkeypatch):
    monkeypatch.setattr(isolated_layer, "MAX_DRAWN_VALUES", 1)
    calls = []

    def timer(call):
        calls.append(call)
        return wall_seconds(call)

    model = nn.Sequential(*network(3), nn.AvgPool3d(2), *network(1))
    warned = []
    choice = choose(model, warned, timer=timer)
    assert choice.forms == dict.fromkeys("0124", "fast")
    assert len(calls) == 2 * 3 * 6  # two sizes, three sound forms, six rounds
    assert len(warned) == 3


def test_a_form_that_gains_next_to_nothing_is_not_taken():
    clock = {PLAIN: 1.0, "fast": 0.99, "slow": 1.2}
    model = network(1, (PLAIN, "fast", "slow"))
    told = []

    def timer(call):
        told.append(call)  # forms take turns in their own order
        return 4 * clock[(PLAIN, "fast", "slow")[(len(told) - 1) % 3]]

    assert choose(model, timer=timer).forms == {"0": PLAIN}
    clock["fast"] = 0.9
    told.clear()
    choice = choose(model, timer=timer)
    assert choice.forms == {"0": "fast"}
    assert "900.00 ms a pass instead of 1000.00" in choice.line


def unet(width=4):
    encoder = build_encoder("unet3d", width)
    return EncoderDecoder(encoder, UNet3dDecoder(encoder.channels, encoder.strides))


@pytest.mark.parametrize("rule", ["measure", "count"])
@pytest.mark.parametrize("precision", [FP32, BF16])
def test_on_a_cpu_and_where_nothing_is_measured_the_form_with_less_arithmetic_is_taken(rule, precision):
    model, warned = unet(), []
    choice = choose_forms(model, (2, 1, 16, 16, 16), precision, WORLD, warned.append, rule=rule)
    for name, edge in (("up_tr256", 2), ("up_tr128", 4), ("up_tr64", 8)):
        folds = folded_by_count(getattr(model.decoder, name), 2, (edge,) * 3)
        assert choice.forms[f"decoder.{name}"] == (FOLDED if folds else PLAIN)
    assert FOLDED in choice.forms.values() and PLAIN in choice.forms.values() and warned == []
    assert "by the number of operations" in choice.line
    set_forms(model, choice.forms)
    assert {name: one.form for name, one in formed_modules(model)} == choice.forms
    plain = choose_forms(model, (2, 1, 16, 16, 16), precision, WORLD, warned.append, rule="plain")
    assert plain.forms == dict.fromkeys(choice.forms, PLAIN) and "as asked for" in plain.line


def test_a_form_that_is_only_counted_is_compared_too(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fold, warned = "p2w.model.unet3d.fold_and_convolve", []
    right = choose_forms(unet(), (2, 1, 16, 16, 16), FP32, WORLD, warned.append, rule="count")
    assert FOLDED in right.forms.values() and len(list((tmp_path / "p2w").iterdir())) == 1
    from p2w.model.forms import fold_and_convolve

    monkeypatch.setattr(fold, lambda *given, **more: 1.1 * fold_and_convolve(*given, **more))
    wrong = choose_forms(unet(8), (2, 1, 16, 16, 16), FP32, WORLD, warned.append, rule="count")
    assert set(wrong.forms.values()) == {PLAIN}
    assert len(warned) == 1 and warned[0].startswith("form folded differs from plain float32 by 0.")
    assert len(list((tmp_path / "p2w").iterdir())) == 1  # a wrong verdict is not remembered


def refuse(call):
    raise AssertionError("nothing is to be timed")


@pytest.mark.slow
def test_what_was_chosen_is_taken_again_on_the_same_device_and_anew_on_another(tmp_path, monkeypatch):
    model, warned = network(), []
    first = choose(model)
    first.write(tmp_path)
    record = read_form_record(tmp_path, warned.append)
    assert record == json.loads((tmp_path / RECORD).read_text()) == first.record
    record["forms"]["0"] = "slow"  # which no measurement would take
    again = choose(model, warned, recorded=record, timer=refuse)
    assert again.forms == {"0": "slow", "1": "fast"} and again.record == record
    assert "as recorded in kernels.json" in again.line
    for change, says in (
        ({"shape": (2, 1, 8, 8, 8)}, "(chosen again: input was [4, 1, 8, 8, 8], is [2, 1, 8, 8, 8])"),
        ({"precision": BF16}, "(chosen again: precision was fp32, is bf16)"),
    ):
        other = choose(model, recorded=record, **change)
        assert other.forms == {"0": "fast", "1": "fast"} and says in other.line
    monkeypatch.setattr(World, "machine", lambda self: {"device": "another card"})
    other = choose(model, recorded=record)
    assert other.forms == {"0": "fast", "1": "fast"} and other.record["device"] == "another card"
    assert f"(chosen again: device was {record['device']}, is another card)" in other.line
    assert warned == []


@pytest.mark.slow
def test_a_recorded_form_that_is_wrong_or_missing_now_is_left_out(monkeypatch):
    model = network()
    record = choose(model).record
    for form, says in (("wrong", "differs"), ("broken", "does not run here")):
        warned = []
        record["forms"] = {"0": "fast", "1": form}
        again = choose(model, warned, recorded=record, timer=refuse)
        assert again.forms == {"0": "fast", "1": PLAIN} and len(warned) == 1 and says in warned[0]
    for forms in ({"0": "fast"}, {"0": "fast", "1": "unheard of"}, {"0": "fast", "2": "fast"}):
        record["forms"] = forms
        again = choose(model, recorded=record)
        assert (
            again.forms == {"0": "fast", "1": "fast"}
            and "(chosen again: kernels.json names other modules)" in again.line
        )
    model = network(1, (PLAIN, "elsewhere"))
    record = {**choose(model).record, "forms": {"0": "elsewhere"}}
    assert choose(model, recorded=record, timer=refuse).forms == {"0": PLAIN}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"forms": 3}', '{"forms": {"0": 7}}', "\udcff", "[" * 10**5]
)
def test_a_record_that_makes_no_sense_is_a_warning(tmp_path, text):
    warned = []
    assert read_form_record(tmp_path, warned.append) is None and warned == []
    (tmp_path / RECORD).write_bytes(text.encode(errors="surrogateescape"))
    assert read_form_record(tmp_path, warned.append) is None
    assert len(warned) == 1 and warned[0].startswith(str(tmp_path / RECORD))


def one_rank(folder, rank):
    """Rank 1's "slow" is faster than its plain form, its "fast" fails; rank 0 finds "fast" the fastest."""
    folder = Path(folder)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    world, warned, found = replace(WORLD, rank=rank, size=2), [], []
    for fails in (False, True):
        model = network(2, (PLAIN, "fast", "slow"))
        if fails and rank == 1:
            for one in model:
                one.forms = lambda *given: (PLAIN, "slow")
        seconds = dict(zip((PLAIN, "fast", "slow"), ((1, 0.5, 0.9), (1, 0.8, 0.7))[rank], strict=True))
        names = iter([form for form in seconds if not (fails and rank == 1 and form == "fast")] * 99)
        choice = choose(model, warned, world=world, timer=lambda call, s=seconds, n=names: 4 * s[next(n)])
        found.append((choice.forms, choice.record["ms"]))
    record = choice.record if rank == 0 else None
    found.append((choose(model, warned, world=world, timer=refuse, recorded=record).forms, {}))
    dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps({"found": found, "warned": warned}))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_take_the_same_forms(tmp_path):
    ranks = [call(one_rank, str(tmp_path), rank) for rank in range(2)]
    try:
        assert [process.wait(100) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["found"] == second["found"]
    slowest, without, recorded = first["found"]
    assert slowest == [
        dict.fromkeys("01", "fast"),
        {key: {PLAIN: 1e3, "fast": 800, "slow": 900} for key in "01"},
    ]
    assert without == [dict.fromkeys("01", "slow"), {key: {PLAIN: 1e3, "slow": 900} for key in "01"}]
    assert recorded[0] == dict.fromkeys("01", "slow")
    assert first["warned"] == [
        "form fast is wrong or fails on another rank; it is left out, at some cost in speed"
    ]
    assert second["warned"] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [BF16, FP32])
def test_on_a_gpu_every_form_of_the_papers_network_is_sound_and_the_chosen_ones_are_no_slower(precision):
    device, warned = torch.device("cuda", 0), []
    world = replace(WORLD, device=device, device_reason=torch.cuda.get_device_name())
    model = unet(32).to(device, memory_format=torch.channels_last_3d)
    choice = choose_forms(model, (4, 1, 32, 64, 64), precision, world, warned.append, rule="measure")
    assert warned == [] and set(choice.forms) == {name for name, _ in formed_modules(model)}
    for name, times in choice.record["ms"].items():
        assert times[choice.forms[name]] <= times[PLAIN], (name, times)
