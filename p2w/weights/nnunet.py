"""Exports a run for nnU-Net: the file that its git master reads as a pretrained encoder, with its adaptation plan.

FOLDER/
    checkpoint_final.pth   {"network_weights": …, "nnssl_adaptation_plan": …}, plain types: what nnU-Net's
                           `nnUNetv2_preprocess_like_nnssl` and `nnUNetv2_plan_like_dynamic` take as -pc
    adaptation_plan.json  config.json   the plan again, and the network, which nnU-Net needs in a folder on Hugging Face
    card.json  README.md   p2w's own: how the input was made, and how to make the same input in nnU-Net
    prepare_nnunet.py     what fits them to a dataset of nnU-Net: its axes, spacing, patch, intensities

What the file holds: docs/paper.md, 7. nnU-Net reads them in nnunetv2/experiment_planning/like_nnssl.py and
nnunetv2/training/nnUNetTrainer/pretraining/pretrainedTrainer.py of its git master.

Parameter names of ResEncL: nnU-Net's convolution module has its layers by name (`conv`, `norm`) and in a list
(`all_modules.0`, `.1`), so its state dict has each tensor under two names and is loaded strictly. Ours has each tensor
once, because safetensors requires that.
"""

import io
import json
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2w.errors import UserError
from p2w.files import write_atomic
from p2w.model.resencl import BLOCKS
from p2w.weights import prepare_nnunet
from p2w.weights.prepare_nnunet import CHECKPOINT, ZYX, intensities, turn

LISTED = {"conv": "all_modules.0", "norm": "all_modules.1"}


def to_nnunet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add every tensor `….conv.x` and `….norm.x` under its second name too; the two share memory.

    Raises UserError for a name of another network.
    """
    named = {}
    for name, value in state.items():
        where, layer, kind = _parts(name)
        named[name] = value
        named[f"{where}.{LISTED[layer]}.{kind}"] = value
    return named


def from_nnunet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep each tensor under its first name. Raises UserError for a name that is no convolution's and no norm's."""
    named = {name: value for name, value in state.items() if ".all_modules." not in name}
    for name in named:
        _parts(name)
    return named


def _parts(name: str) -> tuple[str, str, str]:
    """`encoder.stem.convs.0.conv.weight` -> encoder.stem.convs.0, conv, weight."""
    where, _, kind = name.rpartition(".")
    where, _, layer = where.rpartition(".")
    if layer not in LISTED or not where:
        raise UserError(
            f"{name}: not a parameter of nnU-Net's residual encoder; expected ….conv.… or ….norm.…"
        )
    return where, layer, kind


PUBLISHED_WIDTH = 32  # nnU-Net knows this network by the name ResEncL; others it builds from their arguments
Card = dict[str, Any]


def nnunet_plan(card: Card) -> dict[str, Any]:
    """nnU-Net's adaptation plan of a card: plain types. Sizes and spacings are z, y, x; spacing None where it is unknown.

    `spacing` is what the network saw: the scans' median, times what the resize of parts made of it.
    """
    encoder, inputs = card["encoder"], card["input"]
    name = "ResEncL" if encoder["width"] == PUBLISHED_WIDTH else "ResidualEncoderUNet"
    size, data = inputs["size_zyx"], card["training"]["data"]
    configuration = {
        "data_identifier": f"p2w_{data['fingerprint']}",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "noresample",  # parts are cut from the scans without resampling, and resized to one size
        # CT: the same as ours, with `intensities`. Other modalities: nnU-Net has no percentiles, this comes nearest.
        "normalization_schemes": ["RescaleTo01Normalization" if "modality" in inputs else "CTNormalization"]
        * encoder["in_channels"],
        "use_mask_for_norm": [False] * encoder["in_channels"],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "spacing": inputs["spacing_mm_zyx"]["network"],
        "patch_size": size,
    }
    return {
        "architecture_plans": {
            "arch_class_name": name if name == "ResEncL" else f"dynamic_network_architectures.architectures.unet.{name}",
            "arch_kwargs": architecture(encoder["channels"]),
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "pretrain_plan": {
            "dataset_name": f"p2w_{data['fingerprint']}",
            "plans_name": "p2w",
            "original_median_spacing_after_transp": inputs["spacing_mm_zyx"]["scans_median"],
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],  # z, y, x, as SimpleITK reads
            "transpose_backward": [0, 1, 2],
            "configurations": {"p2w": configuration},
            "experiment_planner_used": "p2w",
        },
        "pretrain_num_input_channels": encoder["in_channels"],
        "recommended_downstream_patchsize": size,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }  # fmt: skip


def architecture(channels: list[int]) -> dict[str, Any]:
    """Arguments of nnU-Net's ResidualEncoderUNet, without its numbers of input and output channels."""
    stages = len(channels)
    return {
        "n_stages": stages,
        "features_per_stage": channels,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "n_blocks_per_stage": list(BLOCKS),
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def write_nnunet(out: Path, state: dict[str, Tensor], card: Card, axes: list[int] | None = None) -> None:
    """Write the folder's files except card.json and README.md; `state` has the tensors `encoder.…`.

    `axes`: `transpose_forward` of the plan of a dataset that the kernels are turned for.
    """
    packed = io.BytesIO()
    checkpoint = {
        "network_weights": to_nnunet(state),
        "nnssl_adaptation_plan": nnunet_plan(card),
        "p2w": json.dumps(card, sort_keys=True),  # so that the file alone says what it was trained on
    }
    checkpoint = turn(checkpoint, axes or ZYX)
    torch.save(checkpoint, packed)
    write_atomic(out / CHECKPOINT, packed.getvalue())
    write_atomic(out / "adaptation_plan.json", json.dumps(checkpoint["nnssl_adaptation_plan"], indent=2))
    write_atomic(out / "config.json", json.dumps({"p2w": card["p2w"], **card["encoder"]}, indent=2))
    script = Path(prepare_nnunet.__file__)
    write_atomic(out / script.name, script.read_text())


def read_nnunet(file: Path) -> dict[str, Tensor]:
    """Read `network_weights` of such a file, kernels z, y, x. Executes no code; raises UserError for any other file."""
    try:
        checkpoint = turn(torch.load(file, weights_only=True, map_location="cpu"), ZYX)
        weights = checkpoint["network_weights"]
        return {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    except Exception as error:  # torch.load raises many kinds of errors for a damaged or foreign file
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{file}: holds no nnU-Net weights ({type(error).__name__}: {reason}); export the run again"
        ) from error


def axes_of(plans: Path) -> list[int]:
    """`transpose_forward` of nnU-Net's plans of a dataset. Raises UserError when the file has none."""
    try:
        axes = [int(axis) for axis in json.loads(plans.read_text())["transpose_forward"]]
        if sorted(axes) != ZYX:
            raise ValueError(f"transpose_forward is {axes}")
        return axes
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{plans}: no plans of nnU-Net ({error}); name nnUNetResEncUNetLPlans.json of the dataset, in its folder below "
            "nnUNet_preprocessed"
        ) from error


def readme(card: Card, out: Path, axes: list[int] | None = None) -> str:
    """Text for README.md of the folder `out`: the commands of nnU-Net, and what they make of axes and intensities."""
    window, inputs = card["input"]["window_hu"], card["input"]
    folder = out.resolve().name
    script = shlex.quote(f"{folder}/prepare_nnunet.py")
    checkpoint = f'"$PWD"/{shlex.quote(f"{folder}/{CHECKPOINT}")}'
    turned = f"for a dataset of `transpose_forward` {axes}" if axes and axes != ZYX else "z, y, x"
    return f"""
## In nnU-Net

Needs nnU-Net's git master, of July 2026 or later; PyPI's 2.8.1 lacks these commands. ID is the number of your dataset.
Type the commands in the folder that this one, `{folder}`, lies in.

```
pip install git+https://github.com/MIC-DKFZ/nnUNet.git
nnUNetv2_plan_and_preprocess -d ID -pl nnUNetPlannerResEncL --no_pp
python {script} -d ID "$nnUNet_preprocessed"
nnUNetv2_preprocess -d ID -plans_name ptPlans__p2w -c 3d_fullres
nnUNetv2_train_pretrained ID 3d_fullres 0 -p ptPlans__p2w -tr PretrainedTrainer
```

`prepare_nnunet.py` needs torch alone, reads the plan that the second command wrote, writes another beside it, and prints the
last two commands. They use the spacing and the patch of the pretraining, {inputs["spacing_mm_zyx"]["network"]} mm and
{inputs["size_zyx"]} voxels (z, y, x). For nnU-Net's own spacing, patch and network with these weights:

```
python {script} -d ID "$nnUNet_preprocessed" --plan dataset
nnUNetv2_preprocess -d ID -plans_name ptPlans_dynamic__p2w -c 3d_fullres
nnUNetv2_train_pretrained ID 3d_fullres 0 -p ptPlans_dynamic__p2w -tr DynamicPretrainedTrainer
```

**Axes.** The kernels in `{CHECKPOINT}` are {turned}. nnU-Net moves the axis with the largest voxels to the front, which
is not z where slices are thinner than pixels; it turns images, but no pretrained kernels. `prepare_nnunet.py` turns
kernels, spacing and patch as the dataset's plan says. nnU-Net does not mirror images: p2w saw x to the left, y to the back,
z up (LPS), so nnU-Net's network sees mirrored bodies in files whose axes run the other way.

**Intensities.** This network saw HU clipped to {window} and scaled to [0, 1]. `prepare_nnunet.py` writes into the plan's
`foreground_intensity_properties_per_channel` what makes nnU-Net's `CTNormalization` the very same,
`{json.dumps(intensities(window))}`. nnU-Net's own `nnUNetv2_preprocess_like_nnssl` and
`nnUNetv2_plan_like_dynamic` take `-pc {checkpoint}` too, but the first z-scores each image, the second
scales by your data's statistics, and neither turns kernels (`p2w export --to nnunet --nnunet-plans PLANS.json` does).

For another patch edit `patch_size` in the plan that `prepare_nnunet.py` wrote; edges are divisible by
{inputs["edges_divisible_by"]}.
"""
