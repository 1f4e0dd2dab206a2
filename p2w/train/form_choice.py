"""Which form each module of a network computes in: measured here at the run's own sizes, or by counting arithmetic.

Some modules have several forms of one computation (`p2w.model.forms`). On a GPU every form is first compared with plain
float32, then timed forward and backward; the fastest is taken. Where nothing is measured, a form is taken for having less
arithmetic, and compared with plain float32 all the same. All ranks examine the forms at once and take the same: a form that
fails anywhere is left out, and the slowest rank's time counts.

RUN/kernels.json keeps what was chosen. A continued run takes the same forms again while device, versions, precision and
sizes are the same, because forms differ by rounding.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import copy
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from p2w.files import write_atomic
from p2w.model.fold import FOLDED
from p2w.model.forms import PLAIN, Formed, formed_modules
from p2w.model.norm import BatchNorm3d
from p2w.model.unet3d import UpBlock, folded_by_count
from p2w.train.layer_probe import (
    Draw,
    Meeting,
    Shape,
    backward_scale,
    few,
    float32_arithmetic,
    forward_backward,
    in_channels_last,
    litter,
    meet,
    run_arithmetic,
)
from p2w.train.optim import Precision
from p2w.train.verdicts import Facts, is_remembered, machine_facts, remember
from p2w.world import World

RECORD = "kernels.json"
WITHIN = {"fp32": 1e-3, "tf32": 0.01}  # of the largest sample, in the Euclidean norm
WITHIN_16 = 0.02  # the same, in bf16 and fp16, whose rounding leaves 0.003 and less
TIMES_PLAIN = 3.0  # more is allowed where the plain form itself rounds so much
GAIN = 0.02  # a form must be faster than the plain one by this share
ROUNDS, CALLS = 5, 4  # measurements of each form, and passes in each of them

Rule = Literal["measure", "count", "plain"]
Say = Callable[[str], None]
Timer = Callable[[Callable[[], None]], float]  # seconds that a call takes
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Choice:
    """The form of every module that has several, {module name: form}; a line for the log; what kernels.json will hold."""

    forms: dict[str, str]
    line: str
    record: dict[str, Any]

    def write(self, run: Path) -> None:
        """Keep it in the run's folder. Raises OSError."""
        write_atomic(run / RECORD, json.dumps(self.record, indent=2))


def read_record(run: Path, warn: Say) -> dict[str, Any] | None:
    """What an earlier start left in the run's folder; None where there is nothing that can be read."""
    path = run / RECORD
    try:
        record = json.loads(path.read_text())
        forms = record["forms"]
        if all(isinstance(form, str) for form in forms.values()):
            return dict(record)
        warn(f"{path}: its forms make no sense; they are chosen anew")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        warn(f"{path}: cannot be read ({error}); forms are chosen anew")
    return None


def choose_forms(
    model: nn.Module, shape: Shape, precision: Precision, world: World, warn: Say, *,
    rule: Rule, recorded: dict[str, Any] | None = None, timer: Timer | None = None,
) -> Choice:  # fmt: skip
    """The form of every module of `model` that has several, the same on all ranks, which must call this together.

    `shape` (B, C, D, H, W) is what this rank feeds the network in one pass. `rule` "measure" times the forms on a GPU and
    counts on a CPU; "count" counts; "plain" takes PyTorch's usual way. `recorded` is what `read_record` gave; rank 0's
    counts. `timer` replaces the GPU's clock, on any device. The model is not touched. Raises what the plain form raises.
    """
    if rule == "measure" and world.device.type != "cuda" and timer is None:
        rule = "count"
    modules = dict(formed_modules(model))
    meetings: dict[str, Meeting] = {}
    for one in meet(model, shape, (Formed,)):
        if one.name in modules:
            meetings.setdefault(one.name, one)
    facts: dict[str, Any] = {
        "device": world.machine()["device"], "torch": torch.__version__, "precision": precision.name,
        "input": list(shape), "channels_last": in_channels_last(model), "rule": rule,
    }  # fmt: skip
    known, anew = _recorded(meetings, facts, recorded, world)
    examiner = _Examiner(precision, world, facts["channels_last"], warn)
    table: dict[str, dict[str, float]] = recorded.get("ms", {}) if known and recorded else {}
    if known is not None:
        forms, how = examiner.kept(meetings, known), f"as recorded in {RECORD}"
    elif rule == "measure":
        seconds = examiner.seconds(meetings, timer or gpu_seconds)
        table = {name: _milliseconds(one, seconds) for name, one in meetings.items()}
        forms = {name: _fastest(one, seconds) for name, one in meetings.items()}
        how = _gain(forms, table, facts)
    elif rule == "count":
        forms = examiner.kept(meetings, {name: _by_count(one) for name, one in meetings.items()})
        how = "by the number of operations, not measured"
    else:
        forms, how = dict.fromkeys(meetings, PLAIN), "as asked for"
    line = f"forms           {_counted(meetings, forms)}, {how}{f' ({anew})' if anew else ''}"
    return Choice(forms, line, {**facts, "forms": forms, "ms": table})


def kind_of(one: Meeting) -> Key:
    """Equal where two modules do the same arithmetic at the same size."""
    module: Formed = one.module
    weights = tuple((tuple(weight.shape), weight.requires_grad) for weight in module.parameters())
    return (type(module).__name__, str(module), module.possible_forms(), weights, one.given)


def gpu_seconds(call: Callable[[], None]) -> float:
    """Seconds of GPU time that `call` takes. Its launches queue up behind a wait, so that the GPU does not wait for them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(5_000_000)  # clock cycles, some milliseconds
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def processor_seconds(call: Callable[[], None]) -> float:
    """Seconds that `call` takes by the clock; of use on a CPU."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class _Examiner:
    """Compares forms with plain float32 and times them, on every rank; all ranks then know what any of them found."""

    def __init__(self, precision: Precision, world: World, channels_last: bool, warn: Say) -> None:
        self.precision, self.world, self.channels_last, self.warn = precision, world, channels_last, warn
        self.said: set[str] = set()
        self.within = WITHIN.get(precision.name, WITHIN_16)

    def kept(self, meetings: dict[str, Meeting], forms: dict[str, str]) -> dict[str, str]:
        """`forms`, with plain for those that are wrong or fail on any rank. Sound ones are remembered between starts."""
        asked = {
            (kind_of(meetings[name]), form): meetings[name] for name, form in forms.items() if form != PLAIN
        }
        if not asked:
            return forms
        facts: Facts = {
            **machine_facts(self.world), "precision": self.precision.name, "channels_last": self.channels_last,
            "forms": sorted(map(repr, asked)),
        }  # fmt: skip
        own = dict.fromkeys(asked, 0.0)
        if not is_remembered(facts, self.warn):
            own = {
                (kind, form): 0.0 if self._sound(one, (form,)) else math.inf
                for (kind, form), one in asked.items()
            }
            if not any(own.values()):
                remember(facts, self.warn)
        found = self._on_all(own)
        return {
            name: PLAIN if found.get((kind_of(meetings[name]), form)) else form
            for name, form in forms.items()
        }

    def seconds(self, meetings: dict[str, Meeting], timer: Timer) -> dict[tuple[Key, str], float]:
        """Seconds of a pass forward and backward in each form of each distinct module; infinite where it is of no use."""
        found: dict[tuple[Key, str], float] = {}
        for one in {kind_of(one): one for one in meetings.values()}.values():
            kind, device = kind_of(one), self.world.device
            found |= {
                (kind, form): math.inf for form in one.module.possible_forms()
            }  # the same list on every rank
            here = one.module.forms(device, self.precision.dtype, one.given[0])
            sound = (PLAIN, *self._sound(one, tuple(form for form in here if form != PLAIN)))
            found |= {(kind, form): value for form, value in self._timed(one, sound, timer).items()}
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return self._on_all(found)

    def _on_all(self, found: dict[tuple[Key, str], float]) -> dict[tuple[Key, str], float]:
        """The largest value of any rank; every rank has the same keys in the same order."""
        if not found:
            return found
        own = torch.tensor(list(found.values()), dtype=torch.float64)[None]
        everywhere = dict(zip(found, self.world.gather(own).amax(0).tolist(), strict=True))
        for (kind, form), value in everywhere.items():
            if form != PLAIN and math.isinf(value) and math.isfinite(found[kind, form]):
                self._say(form, "is wrong or fails on another rank")
        return everywhere

    def _sound(self, one: Meeting, forms: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `forms` that run here and whose output and gradients are plain float32's, within rounding."""
        device = self.world.device
        here = one.module.forms(device, self.precision.dtype, one.given[0])
        forms = tuple(form for form in forms if form in here)
        if not forms:
            return ()
        samples = one.given[0] if device.type == "cuda" else 1
        given, out = self._sizes(one, samples)
        draw, number = Draw(self.precision, device, self.channels_last), few(samples, given, out)
        copies = samples // number
        module = self._alone(one, draw)
        x, by = draw.normal((number, *given[1:])), draw.normal((number, *out[1:])) * backward_scale(copies)
        with float32_arithmetic():
            expected = _results(module, PLAIN, x, by, copies)
        x, by = draw.repeat(x, samples), draw.repeat(by, samples)
        rounding = self._error(module, PLAIN, x, by, expected)
        within = max(self.within, TIMES_PLAIN * rounding if math.isfinite(rounding) else 0.0)
        sound = []
        for form in forms:
            try:
                litter(device, x, by)
                error = self._error(module, form, x, by, expected)
            except Exception as failure:  # whatever a compiler or a kernel raises
                self._say(form, f"does not run here ({_first_line(failure)})")
                continue
            if error <= within:  # NaN is not
                sound.append(form)
            else:
                self._say(
                    form,
                    f"differs from plain float32 by {error:.3g} in {one.name} (rounding explains {within:.2g})",
                )
        return tuple(sound)

    def _say(self, form: str, what: str) -> None:
        """Warn once of each form: a kernel that fails fails in every module."""
        if form not in self.said:
            self.said.add(form)
            self.warn(f"form {form} {what}; it is left out, at some cost in speed")

    def _error(self, module: Formed, form: str, x: Tensor, by: Tensor, expected: list[Tensor]) -> float:
        """The largest difference of any result from the expected one; infinite where results are missing."""
        with run_arithmetic(self.precision, self.world.device):
            found = _results(module, form, x, by, 1)
        if len(found) != len(expected):
            return math.inf
        errors = [_difference(value, right) for value, right in zip(found, expected, strict=True)]
        return max(errors) if all(map(math.isfinite, errors)) else math.nan

    def _timed(self, one: Meeting, forms: tuple[str, ...], timer: Timer) -> dict[str, float]:
        """The median of seconds a pass, forms taking turns."""
        if len(forms) == 1:  # there is nothing to choose from
            return {}
        draw = Draw(self.precision, self.world.device, self.channels_last)
        given, out = self._sizes(one, one.given[0])
        module, number = self._alone(one, draw), few(given[0], given, out)
        x, by = (draw.repeat(draw.normal((number, *size[1:])), given[0]) for size in (given, out))
        weights = [weight for weight in module.parameters() if weight.requires_grad]

        def passes() -> None:
            for _ in range(CALLS):
                forward_backward(module.formed, weights, x, by)

        found: dict[str, list[float]] = {form: [] for form in forms}
        with run_arithmetic(self.precision, self.world.device):
            for turn in range(1 + ROUNDS):
                for form in forms:
                    module.form = form
                    seconds = timer(passes) / CALLS
                    if turn:  # the first one compiles and searches for kernels
                        found[form].append(seconds)
        return {form: statistics.median(values) for form, values in found.items()}

    def _alone(self, one: Meeting, draw: Draw) -> Formed:
        """A copy to train, whose weights are moved off 0 and 1; batch norm asks no other rank."""
        module: Formed = copy.deepcopy(one.module).train()
        for inner in module.modules():
            if isinstance(inner, BatchNorm3d):
                inner.over_ranks = False
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_((weight + 0.1 * draw.normal(tuple(weight.shape))).to(draw.grid))
        return module

    def _sizes(self, one: Meeting, samples: int) -> tuple[Shape, Shape]:
        """Shapes (B, C, D, H, W) of the input and of what `formed` gives for it."""
        with torch.no_grad():
            ghost = copy.deepcopy(one.module).to("meta").eval()
            ghost.form = PLAIN
            given = (samples, *one.given[1:])
            return given, tuple(ghost.formed(torch.empty(given, device="meta")).shape)


def _results(module: Formed, form: str, x: Tensor, by: Tensor, copies: int) -> list[Tensor]:
    """Output, gradients of input and weights, and running statistics, of a pass in that form; the module is not touched.

    Gradients of weights are those of the batch `copies` times over.
    """
    own = copy.deepcopy(module)
    own.form = form
    weights = [weight for weight in own.parameters() if weight.requires_grad]
    output, inputs, *gradients = forward_backward(own.formed, weights, x, by)
    statistics_after = [buffer for buffer in own.buffers() if buffer.is_floating_point()]
    return [output, inputs, *(gradient * copies for gradient in gradients), *statistics_after]


def _difference(value: Tensor, right: Tensor) -> float:
    """The largest distance of an entry along the first axis, over the largest entry of `right`, which `value` may repeat.

    In the Euclidean norm: where ReLU's input rounds to the other side of 0, single gradients differ by all they are.
    """
    rows = right.reshape(len(right), -1)
    pieces = (piece.reshape(len(piece), -1).float() for piece in value.split(len(right)))
    worst = torch.stack([(piece - rows).norm(dim=1).max() for piece in pieces]).max()
    return float(worst / rows.norm(dim=1).max().clamp(min=1e-30))


def _recorded(
    meetings: dict[str, Meeting], facts: dict[str, Any], recorded: dict[str, Any] | None, world: World
) -> tuple[dict[str, str] | None, str]:
    """Rank 0's recorded forms on every rank, where they fit this start; or None, and why those that there are do not."""
    places, why = [-1] * len(meetings), ""
    if recorded is not None:
        changed = [
            f"{name} was {recorded.get(name)}, is {value}"
            for name, value in facts.items()
            if recorded.get(name) != value
        ]
        told = recorded["forms"]
        fits = [(one.module.possible_forms(), told.get(name)) for name, one in meetings.items()]
        if changed:
            why = f"anew, {'; '.join(changed)}"
        elif set(told) != set(meetings) or any(form not in possible for possible, form in fits):
            why = f"anew, {RECORD} names other modules"
        else:
            places = [possible.index(form) for possible, form in fits]
    places = world.gather(torch.tensor(places)[None])[0].tolist()
    if not meetings or min(places) < 0:
        return None, why
    return {
        name: one.module.possible_forms()[place]
        for (name, one), place in zip(meetings.items(), places, strict=True)
    }, ""


def _by_count(one: Meeting) -> str:
    """The form with less arithmetic."""
    module, (samples, _, *size) = one.module, one.given
    if isinstance(module, UpBlock) and folded_by_count(module, samples, (size[0], size[1], size[2])):
        return FOLDED
    return PLAIN


def _fastest(one: Meeting, seconds: dict[tuple[Key, str], float]) -> str:
    """The fastest form, where it is faster than the plain one by more than what measurements differ by."""
    of = {form: seconds[kind_of(one), form] for form in one.module.possible_forms()}
    best = min(of, key=lambda form: of[form])
    return best if of[best] < (1 - GAIN) * of[PLAIN] else PLAIN


def _milliseconds(one: Meeting, seconds: dict[tuple[Key, str], float]) -> dict[str, float]:
    """Of every form that was measured, {form: ms a pass}."""
    of = {form: seconds[kind_of(one), form] for form in one.module.possible_forms()}
    return {form: round(1e3 * value, 4) for form, value in of.items() if math.isfinite(value)}


def _gain(forms: dict[str, str], table: dict[str, dict[str, float]], facts: dict[str, Any]) -> str:
    """How long the modules take that had a choice, in the chosen forms and in the plain ones."""
    chosen = sum(table[name].get(form, 0.0) for name, form in forms.items())
    plain = sum(times.get(PLAIN, 0.0) for times in table.values())
    where = f"{facts['input'][0]} samples in {facts['precision']} on {facts['device']}"
    return f"{chosen:.2f} ms a pass instead of {plain:.2f}, measured with {where}"


def _counted(meetings: dict[str, Meeting], forms: dict[str, str]) -> str:
    """How many modules take each form, of those that could."""
    taken = Counter(form for form in forms.values() if form != PLAIN)
    could = Counter(form for one in meetings.values() for form in one.module.possible_forms())
    return (
        ", ".join(f"{form} in {count} of {could[form]} modules" for form, count in taken.items()) or "plain"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
