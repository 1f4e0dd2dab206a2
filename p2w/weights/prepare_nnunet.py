"""Fit the weights beside this file to one nnU-Net dataset: its axes, and the input that the weights were trained on.

    python prepare_nnunet.py -d ID "$nnUNet_preprocessed"                   spacing, patch, network of the pretraining
    python prepare_nnunet.py -d ID "$nnUNet_preprocessed" --plan dataset    those that nnU-Net planned

nnU-Net must have planned the dataset: nnUNetv2_plan_and_preprocess -d ID -pl nnUNetPlannerResEncL --no_pp. This reads that
plan in nnU-Net's folder nnUNet_preprocessed, writes another one beside it, and prints the commands that go on from there. It
needs Python and torch alone, so that it runs where nnU-Net does; p2w export copies it into the folder of the weights.

Why a dataset needs it: nnU-Net moves the axis with the largest voxels to the front (`transpose_forward` of its plan), which
is not z where slices are thinner than pixels. Kernels must be turned in the same way, and so must spacing and patch.
"""

import argparse
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

CHECKPOINT = "checkpoint_final.pth"
ZYX = [0, 1, 2]
CONFIGURATION = "3d_fullres"


def main() -> None:
    """Read the base plan, write the checkpoint in its axes and the plan, print what to run next."""
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("preprocessed", type=Path, help='nnU-Net\'s folder: "$nnUNet_preprocessed"')
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="number of the dataset")
    parser.add_argument(
        "--plan",
        choices=("pretrained", "dataset"),
        default="pretrained",
        help="spacing, patch and network: those of the pretraining, or those that nnU-Net planned",
    )
    parser.add_argument("--base", default="nnUNetResEncUNetLPlans", help="name of the plan to start from")
    parser.add_argument("-n", default="p2w", help="name of these weights in nnU-Net's files")
    options = parser.parse_args()
    try:
        here = Path(__file__).resolve().parent
        folder = dataset_folder(options.preprocessed, options.d)
        lines = prepare(here, folder, options.d, options.plan, options.base, options.n)
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.exit(2, f"error: {error}\n")
    print("\n".join(lines))


def dataset_folder(root: Path, number: int) -> Path:
    """The dataset's folder in nnUNet_preprocessed. Raises ValueError where there is none, or more than one."""
    found = sorted(root.glob(f"Dataset{number:03d}_*"))
    if len(found) != 1:
        raise ValueError(
            f"{root}: {len(found)} folders Dataset{number:03d}_*, must be one; plan the dataset first: "
            f"nnUNetv2_plan_and_preprocess -d {number} -pl nnUNetPlannerResEncL --no_pp"
        )
    return found[0].resolve()


def prepare(weights: Path, folder: Path, number: int, plan: str, base: str, name: str) -> list[str]:
    """Write the plan into the dataset's folder, and the turned checkpoint where axes differ; give what to print.

    Raises ValueError where the base plan is missing or not of a 3D CT dataset.
    """
    file = folder / f"{base}.json"
    if not file.is_file():
        raise ValueError(
            f"{file}: no such plan; make it with nnUNetv2_plan_and_preprocess -d {number} -pl nnUNetPlannerResEncL --no_pp, "
            "or name another with --base"
        )
    plans = json.loads(file.read_text())
    axes = [int(axis) for axis in plans["transpose_forward"]]
    source = (weights / CHECKPOINT).resolve()
    checkpoint = torch.load(source, weights_only=True, map_location="cpu")
    card = json.loads((weights / "card.json").read_text())
    lines = []
    turned = turn(checkpoint, axes)
    if turned is not checkpoint:
        source = folder / f"{name}_axes_{''.join(map(str, axes))}.pth"
        torch.save(turned, source)
        lines.append(f"# kernels turned to the dataset's axes, transpose_forward {axes}: {source}")
    dynamic = plan == "dataset"
    adapted, said = adapted_plans(plans, turned["nnssl_adaptation_plan"], card, str(source), name, dynamic)
    (folder / f"{adapted['plans_name']}.json").write_text(json.dumps(adapted, indent=2))
    trainer = "DynamicPretrainedTrainer" if dynamic else "PretrainedTrainer"
    return [
        *lines,
        *(f"# {one}" for one in said),
        f"nnUNetv2_preprocess -d {number} -plans_name {adapted['plans_name']} -c {CONFIGURATION}",
        f"nnUNetv2_train_pretrained {number} {CONFIGURATION} 0 -p {adapted['plans_name']} -tr {trainer}",
    ]


def turn(checkpoint: dict[str, Any], axes: list[int]) -> dict[str, Any]:
    """The checkpoint for volumes whose axis j is axis `axes[j]` of z, y, x; the same one if they are so already.

    Kernels (out, in, …) are permuted, and spacings, patches, kernel sizes and strides of the plan with them.
    """
    adaptation = deepcopy(checkpoint["nnssl_adaptation_plan"])
    pretrain = adaptation["pretrain_plan"]
    now = [int(axis) for axis in pretrain["transpose_forward"]]
    if sorted(axes) != ZYX or sorted(now) != ZYX:
        raise ValueError(f"axes {axes} and {now}: each must hold 0, 1 and 2 once")
    if now == axes:
        return checkpoint
    order = [now.index(axis) for axis in axes]

    def permuted(values: Any) -> Any:
        return values if values is None else [values[one] for one in order]

    pretrain["transpose_forward"], pretrain["transpose_backward"] = axes, [axes.index(axis) for axis in ZYX]
    pretrain["original_median_spacing_after_transp"] = permuted(
        pretrain["original_median_spacing_after_transp"]
    )
    for configuration in pretrain["configurations"].values():
        for key in ("spacing", "patch_size"):
            configuration[key] = permuted(configuration[key])
    adaptation["recommended_downstream_patchsize"] = permuted(adaptation["recommended_downstream_patchsize"])
    arguments = adaptation["architecture_plans"]["arch_kwargs"]
    for key in ("kernel_sizes", "strides"):
        arguments[key] = [permuted(one) for one in arguments[key]]
    weights = turn_kernels(checkpoint["network_weights"], order)
    return {**checkpoint, "network_weights": weights, "nnssl_adaptation_plan": adaptation}


def turn_kernels(weights: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """Kernels (out, in, three axes) whose axis j is axis `order[j]` of before; others stay.

    Tensors that share memory, as those under nnU-Net's two names do, still share it afterwards.
    """
    kernels: dict[tuple[Any, ...], torch.Tensor] = {}
    turned = {}
    for name, value in weights.items():
        turned[name] = value
        if value.ndim == 5:
            key = (value.data_ptr(), value.shape, value.stride())
            if key not in kernels:
                kernels[key] = value.permute(0, 1, *(2 + one for one in order)).contiguous()
            turned[name] = kernels[key]
    return turned


def check_base(base: dict[str, Any], adaptation: dict[str, Any], dynamic: bool) -> None:
    """Raise ValueError where the base plan has no 3D configuration, its images are not CT, or its network has other channels
    than the weights and is to be kept (`dynamic`)."""
    if CONFIGURATION not in base["configurations"]:
        raise ValueError(f"{base['plans_name']}: has no {CONFIGURATION}; these weights are of a 3D network")
    planned = base["configurations"][CONFIGURATION]
    schemes = planned["normalization_schemes"]
    if any(scheme != "CTNormalization" for scheme in schemes):
        raise ValueError(
            f"{base['plans_name']}: images are normalised by {', '.join(schemes)}, and these weights want HU; of a CT, "
            'dataset.json says "channel_names": {"0": "CT"}'
        )
    features = planned["architecture"]["arch_kwargs"]["features_per_stage"]
    channels = adaptation["architecture_plans"]["arch_kwargs"]["features_per_stage"]
    if dynamic and any(a != b for a, b in zip(features, channels, strict=False)):
        raise ValueError(
            f"{base['plans_name']}: its network has {features} channels, and the weights have {channels}; leave out "
            "--plan dataset, or name the plan of nnUNetPlannerResEncL with --base"
        )


def adapted_plans(
    base: dict[str, Any],
    adaptation: dict[str, Any],
    card: dict[str, Any],
    source: str,
    name: str,
    dynamic: bool,
) -> tuple[dict[str, Any], list[str]]:
    """nnU-Net's plans for these weights, in its own form, from a base plan; and what its reader should know.

    Raises ValueError where `check_base` does.
    """
    check_base(base, adaptation, dynamic)
    plans, said = deepcopy(base), []
    planned = plans["configurations"][CONFIGURATION]
    own = intensities(card["input"]["window_hu"])
    properties = plans["foreground_intensity_properties_per_channel"]
    for channel in range(len(planned["normalization_schemes"])):
        properties[str(channel)] = {**properties[str(channel)], **own}
    said.append(f"CTNormalization with {json.dumps(own)}: HU {card['input']['window_hu']} become 0 and 1")
    pretrained = next(iter(adaptation["pretrain_plan"]["configurations"].values()))
    if not dynamic:
        if pretrained["spacing"] is None:
            said.append("the spacing of the pretraining is not known: that of nnU-Net's plan is kept")
        else:
            planned["spacing"] = pretrained["spacing"]
        architecture = adaptation["architecture_plans"]
        planned["architecture"] = {
            "network_class_name": architecture["arch_class_name"],
            "arch_kwargs": architecture["arch_kwargs"],
            "_kw_requires_import": architecture["arch_kwargs_requiring_import"],
        }
        planned["patch_size"] = adaptation["recommended_downstream_patchsize"]
        planned["batch_size"] = 2  # as nnU-Net's own adaptation of pretrained weights
    said.append(
        f"spacing {planned['spacing']} mm, patch {planned['patch_size']} voxels, along the dataset's axes "
        f"{base['transpose_forward']}"
    )
    plans["plans_name"] = f"ptPlans{'_dynamic' if dynamic else ''}__{name}"
    spacing = "_".join(f"{mm:.2f}" for mm in planned["spacing"])
    planned["data_identifier"] = f"{re.sub(r'[^A-Za-z0-9]', '_', name)}__Spacing__{spacing}___Norm__HU"
    plans["configurations"] = {CONFIGURATION: planned}
    plans["pretrain_info"] = {
        "checkpoint_path": source,
        "checkpoint_name": name,
        **{
            key: adaptation[key] for key in ("key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe")
        },
        "pt_num_in_channels": adaptation["pretrain_num_input_channels"],
        "pt_used_patchsize": pretrained["patch_size"],
        "pt_recommended_downstream_patchsize": adaptation["recommended_downstream_patchsize"],
        "pt_architecture_kwargs": {},
        "citations": [],
    }
    return plans, said


def intensities(window_hu: list[float]) -> dict[str, float]:
    """`foreground_intensity_properties_per_channel` with which nnU-Net's CTNormalization, (clip(HU, 0.5 %, 99.5 %) - mean) /
    std, is our input: HU clipped to the window and scaled to [0, 1]."""
    low, high = window_hu
    return {"mean": low, "std": high - low, "percentile_00_5": low, "percentile_99_5": high}


if __name__ == "__main__":
    main()
