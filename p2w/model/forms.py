"""Forms of a module: several ways to compute the same function, of which the fastest depends on the machine and the sizes.

A module that has forms says which of them can run somewhere, and computes what depends on the form apart from the rest, so
that each form can be compared with the plain one and timed. A form is a plain attribute: no parameter, no buffer, no key of
the state dict. Checkpoints know nothing of it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from p2w.errors import UserError

PLAIN = "plain"


class Formed(nn.Module):
    """A module that computes the same function in several forms; `form` says which one is used."""

    form: str = PLAIN

    def forms(self, device: torch.device, dtype: torch.dtype | None, samples: int) -> tuple[str, ...]:
        """Names of the forms that can run on `device`, "plain" first.

        `dtype` is that of the network's arithmetic under autocast (None: float32 without autocast), `samples` how many
        samples pass at a time. Whether a form is faster there is for the caller to measure.
        """
        raise NotImplementedError

    def formed(self, x: Tensor) -> Tensor:
        """What depends on the form, computed in the form that is set, from the module's first input (B, C, D, H, W)."""
        raise NotImplementedError

    def possible_forms(self) -> tuple[str, ...]:
        """Names of all forms that this module has on any device, "plain" first."""
        raise NotImplementedError


def formed_modules(model: nn.Module) -> list[tuple[str, Formed]]:
    """(name, module) of every module of `model` that has more than one form on some device, in the model's own order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Formed) and len(module.possible_forms()) > 1
    ]


def set_forms(model: nn.Module, forms: Mapping[str, str]) -> None:
    """Set the form of the modules that `forms` names, {module name: form}; other modules keep theirs.

    Raises UserError for a module that is not in the model, or a form that the module does not have; then none is set.
    """
    there = dict(formed_modules(model))
    for name, form in forms.items():
        module = there.get(name)
        if module is None:
            raise UserError(
                f"form of {name!r}: no such module has forms; known are {', '.join(there) or 'none'}"
            )
        if form not in module.possible_forms():
            raise UserError(f"form {form!r} of {name}: unknown; one of {', '.join(module.possible_forms())}")
    for name, form in forms.items():
        there[name].form = form


def forms_of(model: nn.Module) -> dict[str, str]:
    """{module name: form that is set} of all modules with forms."""
    return {name: module.form for name, module in formed_modules(model)}
