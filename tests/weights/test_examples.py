"""The examples run unchanged."""

import importlib.util
import re
import runpy
import sys

import pytest
from processes import REPO


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune_torch", "monai_unet_decoder"])
def test_an_example_takes_its_ten_steps(name, trained_run, monkeypatch, capsys):
    if name.startswith("monai") and importlib.util.find_spec("monai") is None:
        pytest.skip("needs monai: pip install 'p2w[examples]'")
    monkeypatch.setattr(sys, "argv", [name, str(trained_run)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO / "examples" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 10 and all(0 < loss < 3 for loss in losses)
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("name", ["finetune_torch", "monai_unet_decoder"])
def test_an_example_is_short_and_says_how_it_is_run(name):
    text = (REPO / "examples" / f"{name}.py").read_text()
    assert f"python examples/{name}.py" in text and text.count("\n") < 90
