"""Optimizer, precision and learning rate: chosen as the settings say, refused with one line, computed as by hand."""

import copy
import importlib
import math
import sys

import pytest
import torch

from p2w.config import OptimConfig
from p2w.errors import UserError
from p2w.train.optim import (
    Precision,
    Schedule,
    build_optimizer,
    choose_precision,
    load_optimizer,
    optimizer_state,
)

MODEL = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("name", "kind", "group"),
    [
        ("adam", torch.optim.Adam, {"betas": (0.8, 0.99)}),
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.99)}),
        ("sgd", torch.optim.SGD, {"momentum": 0.7}),
    ],
)
@pytest.mark.parametrize(("fused", "said"), [("torch", "torch, fused"), ("none", "torch")])
def test_optimizer_is_the_one_asked_for(name, kind, group, fused, said):
    config = OptimConfig(
        name=name, lr=0.25, betas=(0.8, 0.99), sgd_momentum=0.7, weight_decay=0.125, fused=fused
    )
    optimizer, whose = build_optimizer(config, MODEL)
    assert type(optimizer) is kind and whose == said
    found = optimizer.param_groups[0]
    assert {**group, "lr": 0.25, "weight_decay": 0.125, "fused": fused == "torch"}.items() <= found.items()


def test_no_apex_is_said_in_one_line():
    assert importlib.util.find_spec("apex") is None
    with pytest.raises(UserError, match=r"optim\.fused=apex: apex is not installed; .*--optim\.fused torch"):
        build_optimizer(OptimConfig(fused="apex"), MODEL)


@pytest.mark.parametrize("nvidia", [False, True])
def test_the_wrong_apex_is_recognised(tmp_path, monkeypatch, nvidia):
    """PyPI's apex as it lies on disk: a Pyramid toolkit without `optimizers`; it must not even be imported."""
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('apex was imported')\n")
    for name in ("amp.py", "models.py", "views.py"):
        (package / name).touch()
    if nvidia:
        (package / "optimizers").mkdir()
        (package / "optimizers" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(UserError) as error:
        build_optimizer(OptimConfig(fused="apex"), MODEL)
    message = str(error.value)
    assert "\n" not in message and message.endswith("pass --optim.fused torch")
    if nvidia:
        assert "need a CUDA device" in message
    else:
        assert f"the apex at {package}/__init__.py is PyPI's web toolkit, not NVIDIA's" in message
    assert "apex" not in sys.modules


def test_precision_on_a_cpu():
    cpu = torch.device("cpu")
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    auto = choose_precision("auto", cpu)
    assert (auto.name, auto.dtype) == (("bf16", torch.bfloat16) if has else ("fp32", None))
    assert "cpu" in auto.reason
    assert choose_precision("fp32", cpu).dtype is None
    with pytest.raises(
        UserError, match=r"train\.precision=fp16: float16 needs a GPU; pass --train\.precision auto"
    ):
        choose_precision("fp16", cpu)
    with pytest.raises(UserError, match=r"train\.precision=tf32: needs a GPU of compute capability 8\.0"):
        choose_precision("tf32", cpu)


def test_float32_on_a_gpu_is_what_its_name_says():
    """Set for the process, whatever PyTorch's own default: tf32 in convolutions, ieee in matrix products."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = (conv.fp32_precision, matmul.fp32_precision)
    try:
        for name, how in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "tf32"), ("fp16", "tf32")):
            assert Precision(name, None, "test").apply().float32 == how
            assert (conv.fp32_precision, matmul.fp32_precision) == (how, how)
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_an_optimizer_state_knows_no_graph_and_comes_back_into_any_optimizer(name):
    """A rate that is a tensor is saved as a number; averages and counts return, the rest is the new run's own."""

    def make(**more):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        config = OptimConfig(name=name, lr=0.1, **more)
        return model, build_optimizer(config, model)[0]

    def step(model, optimizer):
        model.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"], group["capturable"] = torch.tensor(0.25), True
    state = optimizer_state(optimizer)
    assert (state["param_groups"][0]["lr"], state["param_groups"][0]["capturable"]) == (0.25, False)
    for fused in ("torch", "none"):
        again, other = make(fused=fused)
        again.load_state_dict(model.state_dict())
        load_optimizer(other, copy.deepcopy(state))
        group = other.param_groups[0]
        assert (group["lr"], bool(group["fused"])) == (0.1, fused == "torch")
        step(again, other)
        continued, first = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        for group in first["param_groups"]:
            group["lr"], group["capturable"] = 0.1, False
        like = build_optimizer(OptimConfig(name=name, lr=0.1), continued)[0]
        like.load_state_dict(first)
        step(continued, like)
        for one, two in zip(again.parameters(), continued.parameters(), strict=True):
            assert torch.allclose(one, two, atol=1e-7)


def test_constant_with_warm_up_by_hand():
    schedule = Schedule(OptimConfig(lr=1.0, schedule="constant", warmup_steps=4), 10)
    assert [schedule.rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    for _ in range(50):
        schedule.observe(1.0)
    assert schedule.rate(5) == 1.0  # only plateau halves


def test_cosine_by_hand():
    schedule = Schedule(OptimConfig(lr=2.0, schedule="cosine", warmup_steps=2), 10)
    assert [schedule.rate(step) for step in (0, 1, 2)] == [1.0, 2.0, 2.0]
    assert schedule.rate(6) == pytest.approx(2 * (0.01 + 0.99 / 2))  # half way
    assert schedule.rate(4) == pytest.approx(2 * (0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2))  # a quarter
    assert schedule.rate(10) == schedule.rate(99) == pytest.approx(0.02)  # the floor, and it stays there


def test_plateau_by_hand_and_after_a_resume():
    """Patience 1: the second validation in a row that brings nothing halves the rate, the fourth again."""
    config = OptimConfig(lr=1.0, schedule="plateau", plateau_patience=1)
    seen = [1.0, 0.5, 0.6, 0.49999, 0.5, 0.5, 0.4, 0.45, float("nan"), 0.3]
    rates = [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]
    bad = [0, 0, 1, 2, 3, 4, 0, 1, 2, 0]  # 0.49999 is better, but by less than a ten-thousandth
    whole = Schedule(config, 100)
    for index, value in enumerate(seen):
        whole.observe(value)
        assert (whole.rate(50), whole.bad) == (rates[index], bad[index]), index
        again = Schedule(config, 100)  # as if killed here, and continued
        again.load_state_dict(whole.state_dict())
        for later, more in enumerate(seen[index + 1 :], index + 1):
            again.observe(more)
            assert (again.rate(50), again.bad) == (rates[later], bad[later])
