"""Tensors of a file into an encoder, with a report: what matched, what was adapted, what is missing, what is left over."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from p2w.errors import UserError
from p2w.model import Encoder

State = dict[str, Tensor]
COUNTER = "num_batches_tracked"  # of batch norms; nothing depends on it, and old files have none


@dataclass(frozen=True)
class Report:
    """Names of tensors of the network (of the file, in `unexpected` and `head`)."""

    what: str
    """Which format, network and width."""
    matched: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    """Fitted to another number of input channels."""
    missing: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    """Of the file's own decoder or classifier, which a target task replaces."""
    notes: tuple[str, ...] = field(default=())

    @property
    def whole(self) -> bool:
        """Whether every tensor of the encoder has its value and none of the file's is left unexplained."""
        return not (self.missing or self.misshapen or self.unexpected)

    def table(self) -> str:
        """A line for each kind that there is, with its number and first names."""
        rows = [f"{self.what}"]
        for kind in ("matched", "adapted", "missing", "misshapen", "unexpected", "head"):
            names: tuple[str, ...] = getattr(self, kind)
            if names:
                shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
                rows.append(f"  {kind:10} {len(names):5}  {shown}")
        return "\n".join(rows + [f"  {note}" for note in self.notes])


def fit(
    encoder: Encoder, state: State, what: str, head: tuple[str, ...] = (), notes: tuple[str, ...] = ()
) -> Report:
    """Load `state` (names of `encoder`) where names and shapes agree, input channels adapted, and say what happened.

    The encoder takes the values as float32 on its own device; what the report does not call matched or adapted keeps what
    it had.
    """
    wanted = encoder.state_dict()
    taken: State = {}
    adapted, misshapen = [], []
    for name, value in state.items():
        if name not in wanted:
            continue
        if value.shape != wanted[name].shape:
            fitted = adapt(encoder, name, value, wanted[name].shape)
            if fitted is None:
                misshapen.append(f"{name} {tuple(value.shape)} for {tuple(wanted[name].shape)}")
                continue
            adapted.append(name)
            taken[name] = fitted
        else:
            taken[name] = value
    encoder.load_state_dict(taken, strict=False)
    return Report(
        what,
        matched=tuple(name for name in taken if name not in adapted),
        adapted=tuple(adapted),
        missing=tuple(name for name in wanted if name not in state and not name.endswith(COUNTER)),
        misshapen=tuple(misshapen),
        unexpected=tuple(name for name in state if name not in wanted),
        head=head,
        notes=notes,
    )


def adapt(encoder: Encoder, name: str, value: Tensor, shape: torch.Size) -> Tensor | None:
    """`value` for the encoder's number of input channels, or None when that is not what differs.

    Convolutions: the weights of the file's image channels are summed and shared out evenly, so that equal channels give what
    one channel gave: 1 -> n repeats and divides by n, 3 -> 1 sums. Norms of the image take the mean.
    """
    n = encoder.in_channels
    if name in encoder.norms_input and value.ndim == 1:
        return value.mean().expand(n).clone()
    if name not in encoder.sees_input or value.ndim != 5:
        return None
    image = value.shape[1] - (shape[1] - n)  # what is not the image comes behind it, and has its own number
    if image < 1 or value.shape[:1] + value.shape[2:] != shape[:1] + shape[2:]:
        return None
    shared = value[:, :image].sum(1, keepdim=True) / n
    return torch.cat((shared.expand(-1, n, -1, -1, -1), value[:, image:]), dim=1)


def refuse(report: Report, where: str) -> None:
    """Raise UserError when the encoder would keep random values, or tensors of the file would be lost."""
    if report.whole:
        return
    total = len(report.matched) + len(report.adapted) + len(report.missing) + len(report.misshapen)
    first = (*report.missing, *report.misshapen, *report.unexpected)[0]
    raise UserError(
        f"{where}: {report.what}: of {total} tensors {len(report.missing)} are missing, {len(report.misshapen)} have "
        f"another shape, and the file has {len(report.unexpected)} unknown ones, first {first}; a part of a network is "
        f"not loaded: p2w inspect {where}"
    )
