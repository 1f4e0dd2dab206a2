"""What an encoder is fed follows from the card of its weights, in whichever form they are named."""

import pytest
import torch

from p2w.errors import UserError
from p2w.inference.encoder_input import EncoderOptions, load_encoder_input
from p2w.weights import export


def test_a_run_an_export_and_their_card_agree(trained_run, tmp_path):
    """Size, window and spacing come from the card, and the weights are those of the best checkpoint."""
    export.main([str(trained_run), "--to", "safetensors", "--out", str(tmp_path / "encoder.safetensors")])
    cpu, said = torch.device("cpu"), EncoderOptions()
    found = [
        load_encoder_input(name, said, cpu).settings()
        for name in (str(trained_run), str(tmp_path / "encoder.safetensors"), f"{trained_run}@10")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["size_zyx"] == [16, 32, 32] and found[0]["spacing_mm_zyx"] is not None
    assert load_encoder_input(f"{trained_run}@20", said, cpu).weights != found[0]["weights"]
    with pytest.raises(UserError, match="leave --network and --width out"):
        load_encoder_input(str(trained_run), EncoderOptions(width=2), cpu)
    with pytest.raises(UserError, match="exclude each other"):
        load_encoder_input(str(trained_run), EncoderOptions(spacing=(1, 1, 1), native_spacing=True), cpu)
