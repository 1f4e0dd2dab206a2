"""Forms are attributes of modules: found by name, set by name, in no state dict."""

import copy

import pytest
import torch

from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.forms import formed_modules, set_forms


def forms_of(model):
    return {name: one.form for name, one in formed_modules(model)}


def network(skips=False):
    torch.manual_seed(0)
    encoder = build_encoder("unet3d", 2)
    return EncoderDecoder(encoder, build_decoder(encoder, skips))


def test_forms_are_set_by_name_survive_a_copy_and_are_no_part_of_a_checkpoint():
    plain = network()
    assert set(forms_of(plain).values()) == {"plain"}
    chosen = {"decoder.up_tr64": "folded", "encoder.down_tr64.ops.0.bn1": "flat"}
    other = copy.deepcopy(plain)
    set_forms(other, chosen)
    assert {name: form for name, form in forms_of(copy.deepcopy(other)).items() if form != "plain"} == chosen
    assert set(forms_of(plain).values()) == {"plain"}
    assert list(plain.state_dict()) == list(other.state_dict())
    assert [name for name, _ in plain.named_buffers()] == [name for name, _ in other.named_buffers()]


def test_which_modules_have_forms():
    """14 norms; of the three up-samplings those without a skip."""
    assert len(formed_modules(network())) == 14 + 3
    assert len(formed_modules(network(skips=True))) == 14
    for name, module in formed_modules(network()):
        forms = module.forms(torch.device("cpu"), None, 1)
        assert forms == (
            ("plain", "folded")
            if name.startswith("decoder.up_tr") and "bn1" not in name
            else ("plain", "flat")
        )


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"decoder.up_tr32": "folded"}, r"form of 'decoder\.up_tr32': no such module"),
        ({"decoder.up_tr64": "flat"}, r"form 'flat' of decoder\.up_tr64: unknown; one of plain, folded"),
    ],
)
def test_what_is_not_there_is_refused_and_nothing_is_set(forms, message):
    one = network()
    with pytest.raises(UserError, match=message):
        set_forms(one, {"decoder.up_tr128": "folded"} | forms)
    assert set(forms_of(one).values()) == {"plain"}


@pytest.mark.parametrize("training", [True, False])
def test_every_form_on_this_device_computes_the_plain_function(training):
    one = network().double().train(training)
    x = torch.rand(2, 1, 8, 16, 8, dtype=torch.float64)
    before = copy.deepcopy(one.state_dict())
    expected, statistics = one(x), one.state_dict()
    other = network().double().train(training)
    other.load_state_dict(before)
    set_forms(other, {name: module.forms(x.device, None, 2)[-1] for name, module in formed_modules(other)})
    torch.testing.assert_close(other(x), expected, atol=1e-12, rtol=0)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, statistics[name], atol=1e-12, rtol=0)
