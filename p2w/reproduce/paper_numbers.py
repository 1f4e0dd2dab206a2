"""The paper's own numbers, in percent, as printed (docs/paper.md, 2 and 3), and what each task is compared on.

Every mean and standard deviation is over ten trials. The trials are not published, so differences within these tables
can only be tested with Welch's test; the paper used a paired t-test.
"""

from dataclasses import dataclass

from p2w.stats import Summary

TRIALS = 10
OURS = "Parts2Whole"
TASKS = {"ncc": "NCC", "ncs": "NCS", "lcs": "LCS", "ecc": "ECC", "bms": "BMS"}

METRICS = {"auc": "AUC", "iou": "IoU at 0.5", "mean_iou": "mean IoU", "dice": "Dice"}
# The metric of the paper's number for each task. The paper says AUC and IoU, and that LCS is binarised at 0.5. For NCS, the
# mean of background and foreground IoU over thresholds 0.50 … 0.95 is inferred from the scale of its numbers; for BMS,
# foreground IoU at 0.5 is our choice.
COMPARED = {"ncc": "auc", "ncs": "mean_iou", "lcs": "iou", "ecc": "auc", "bms": "iou"}
INFERRED = {"ncs": "inferred", "bms": "our choice"}
MAY_COMPARE = {  # possible metrics of the paper's number for a task; with any other metric it is not shown
    "ncc": ("auc",),
    "ncs": ("mean_iou", "iou"),
    "lcs": ("iou",),
    "ecc": ("auc",),
    "bms": ("iou", "mean_iou"),
}


def _row(*cells: tuple[float, float]) -> dict[str, Summary]:
    return {task: Summary(mean, sd, TRIALS) for task, (mean, sd) in zip(TASKS, cells, strict=False)}


TABLE1: dict[str, dict[str, Summary]] = {
    "Scratch": _row((94.25, 5.07), (74.05, 1.97), (77.82, 3.87), (79.99, 8.06), (63.91, 1.41)),
    "I3D": _row((98.26, 0.27), (71.58, 0.55), (70.65, 4.26), (80.55, 1.11), (67.83, 0.75)),
    "NiftyNet": _row((94.14, 4.57), (52.98, 2.05), (83.23, 1.05), (77.33, 8.05), (60.78, 1.60)),
    "MedicalNet": _row((95.80, 0.49), (75.68, 0.32), (85.52, 0.58), (86.43, 1.44), (66.09, 1.35)),
    "Models Genesis": _row((97.90, 0.57), (77.62, 0.64), (84.17, 1.93), (87.20, 2.87), (68.08, 1.15)),
    OURS: _row((98.67, 0.23), (77.35, 0.61), (86.70, 0.62), (86.14, 2.97), (68.33, 0.41)),
}


@dataclass(frozen=True)
class Parts:
    """How networks of a column of Table 2 were pretrained: volume of a part as a share of its whole, skip connections."""

    low: float
    high: float
    skips: bool = False

    @property
    def label(self) -> str:
        """The label in the paper, e.g. `[1/16,1/4]`."""
        return f"[{fraction(self.low)},{fraction(self.high)}]" + (" w/ skips" if self.skips else "")


def fraction(value: float) -> str:
    """0.0625 -> `1/16`; a number other than 1/n as a decimal."""
    n = round(1 / value)
    return ("1" if n == 1 else f"1/{n}") if abs(value * n - 1) < 1e-6 else f"{value:.3g}"


TABLE2: dict[Parts, dict[str, Summary]] = {
    Parts(1 / 16, 1, skips=True): _row((88.48, 8.24), (70.64, 0.21)),
    Parts(1 / 16, 1): _row((93.78, 2.12), (72.72, 0.42)),
    Parts(1 / 16, 1 / 2): _row((91.48, 0.45), (73.29, 0.58)),
    Parts(1 / 16, 1 / 4): _row((94.84, 1.58), (74.23, 0.87)),
    Parts(1 / 16, 1 / 8): _row((93.52, 1.32), (73.43, 0.32)),
    Parts(1 / 32, 1 / 16): _row((91.69, 4.12), (73.66, 0.36)),
}
FRACTIONS = {"ncc": 0.45, "ncs": 0.10}  # of the training data, in Table 2 and Fig. 3
FIG3_R = {"ncc": 0.82, "ncs": 0.88}  # Pearson's r of 1 - validation MSE with the mean score
CHECKPOINTS, FINE_TUNINGS = 26, 5
