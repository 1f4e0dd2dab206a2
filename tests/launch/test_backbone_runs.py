"""Other backbones in a real run of two ranks: no parameter is waited for, and what is left loads and exports."""

import pytest
from launch_runs import TINY, metrics, status

import p2w
from p2w.weights import export


@pytest.mark.parametrize(
    ("encoder", "width", "size"), [("resencl", 1, (32, 32, 64)), ("vit3d", 1, (16, 16, 16))]
)
def test_two_ranks_train_it_and_it_leaves_as_a_file(forge, tiny_set, tmp_path, encoder, width, size):
    run = tmp_path / "run"
    network = ["--model.name", encoder, "--model.width", width, "--pretext.size", *size]
    codes, _, err = forge.run(
        tmp_path,
        "demo",
        "--shards",
        tiny_set,
        "--run-dir",
        run,
        *TINY,
        *network,
        "--train.steps",
        6,
        ranks=2,
        draws=encoder == "vit3d",
    )
    assert codes == [0, 0], err
    assert status(run)["state"] == "finished"
    assert any("similarity/auc" in record for record in metrics(run))
    made = p2w.load(run)
    to = {"resencl": "nnunet", "vit3d": "safetensors"}[encoder]
    assert export.main([str(run), "--to", to, "--out", str(tmp_path / "out")]) == 0
    again = p2w.load(tmp_path / "out")
    assert all((a == b).all() for a, b in zip(made.parameters(), again.parameters(), strict=True))
