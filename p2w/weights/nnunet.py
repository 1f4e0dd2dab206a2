"""Exports a run for nnU-Net: the file that its git master reads as a pretrained encoder, with its adaptation plan.

FOLDER/
    checkpoint_final.pth   {"network_weights": …, "nnssl_adaptation_plan": …}, plain types: what nnU-Net's
                           `nnUNetv2_preprocess_like_nnssl` and `nnUNetv2_plan_like_dynamic` take as -pc
    adaptation_plan.json  config.json   the plan again, and the network, which nnU-Net needs in a folder on Hugging Face
    card.json  README.md   p2w's own: how the input was made, and how to make the same input in nnU-Net

What the file holds: docs/paper.md, 7. nnU-Net reads them in nnunetv2/experiment_planning/like_nnssl.py and
nnunetv2/training/nnUNetTrainer/pretraining/pretrainedTrainer.py of its git master.

Parameter names of ResEncL: nnU-Net's convolution module has its layers by name (`conv`, `norm`) and in a list
(`all_modules.0`, `.1`), so its state dict has each tensor under two names and is loaded strictly. Ours has each tensor
once, because safetensors requires that.
"""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2w.errors import UserError
from p2w.files import write_atomic
from p2w.model.resencl import BLOCKS

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


CHECKPOINT = "checkpoint_final.pth"
PUBLISHED_WIDTH = 32  # nnU-Net knows this network by the name ResEncL; others it builds from their arguments
Card = dict[str, Any]


def nnunet_plan(card: Card) -> dict[str, Any]:
    """nnU-Net's adaptation plan of a card: plain types. Sizes and spacings are z, y, x; spacing None where it is unknown.

    `spacing` is what the network saw: the scans' median, times what the resize of parts made of it.
    """
    encoder, fed = card["encoder"], card["input"]
    name = "ResEncL" if encoder["width"] == PUBLISHED_WIDTH else "ResidualEncoderUNet"
    size, data = fed["size_zyx"], card["training"]["data"]
    configuration = {
        "data_identifier": f"p2w_{data['fingerprint']}",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "noresample",  # parts are cut from the scans without resampling, and resized to one size
        # CT: the same as ours, with `intensities`. Other modalities: nnU-Net has no percentiles, this comes nearest.
        "normalization_schemes": ["RescaleTo01Normalization" if "modality" in fed else "CTNormalization"]
        * encoder["in_channels"],
        "use_mask_for_norm": [False] * encoder["in_channels"],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "spacing": fed["spacing_mm_zyx"]["network"],
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
            "original_median_spacing_after_transp": fed["spacing_mm_zyx"]["scans_median"],
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


def intensities(window_hu: list[float]) -> dict[str, float]:
    """`foreground_intensity_properties_per_channel` with which nnU-Net's CTNormalization, (clip(HU, 0.5 %, 99.5 %) - mean) /
    std, is our input: HU clipped to the window and scaled to [0, 1]."""
    low, high = window_hu
    return {"mean": low, "std": high - low, "percentile_00_5": low, "percentile_99_5": high}


def write_nnunet(out: Path, state: dict[str, Tensor], card: Card) -> None:
    """Write the folder's files except card.json and README.md; `state` has the tensors `encoder.…`."""
    packed, adaptation = io.BytesIO(), nnunet_plan(card)
    torch.save({"network_weights": to_nnunet(state), "nnssl_adaptation_plan": adaptation}, packed)
    write_atomic(out / CHECKPOINT, packed.getvalue())
    write_atomic(out / "adaptation_plan.json", json.dumps(adaptation, indent=2))
    write_atomic(out / "config.json", json.dumps({"p2w": card["p2w"], **card["encoder"]}, indent=2))


def read_nnunet(file: Path) -> dict[str, Tensor]:
    """Read `network_weights` of such a file, without executing code. Raises UserError for any other file."""
    try:
        weights = torch.load(file, weights_only=True, map_location="cpu")["network_weights"]
        return {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    except Exception as error:  # torch.load raises many kinds of errors for a damaged or foreign file
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{file}: holds no nnU-Net weights ({type(error).__name__}: {reason}); export the run again"
        ) from error


def readme(card: Card) -> str:
    """Text for README.md: the commands of nnU-Net, and how to set its normalisation."""
    window, fed = card["input"]["window_hu"], card["input"]
    return f"""
## In nnU-Net

Needs nnU-Net's git master (its documentation: finetuning from nnssl checkpoints); PyPI's 2.8.1 lacks these commands.

```
nnUNetv2_plan_and_preprocess -d ID -pl nnUNetPlannerResEncL --no_pp     # A: nnU-Net's own plan, these weights
nnUNetv2_plan_like_dynamic -d ID -n p2w -pc {CHECKPOINT} -pl nnUNetResEncUNetLPlans
nnUNetv2_train_pretrained ID 3d_fullres 0 -p ptPlans_dynamic__p2w -tr DynamicPretrainedTrainer

nnUNetv2_preprocess_like_nnssl -d ID -n p2w -pc {CHECKPOINT} -am like_pretrained     # B: spacing, patch of the pretraining
nnUNetv2_train_pretrained ID 3d_fullres 0 -p ptPlans__p2w____... -tr PretrainedTrainer
```

**Normalisation.** This network saw HU clipped to {window} and scaled to [0, 1]. nnU-Net's `CTNormalization`
does the very same where `foreground_intensity_properties_per_channel["0"]` in its plans holds

```
{json.dumps(intensities(window))}
```

With A, write these into `nnUNetResEncUNetLPlans.json` between the first command and the second; left as they are, it clips
to percentiles of your data and scales by their mean and deviation. B always z-scores each image and clips nothing: the norm
behind the first convolution takes shift and scale out again, but voxels beyond the window differ, and so does the padding at
a patch's border (0 is {window[0]:g} HU here, the image's mean there).

**Spacing and patch.** `spacing` in the plan, {fed["spacing_mm_zyx"]["network"]} mm (z, y, x), is the middle of what
the network saw; the patch is that of the pretraining, {fed["size_zyx"]} voxels. For another, edit
`patch_size` in the plans that nnU-Net writes; edges are divisible by {fed["edges_divisible_by"]}.
"""
