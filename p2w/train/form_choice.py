"""Chooses in which form each module computes: by measuring at the run's own sizes, or by counting operations.

Some modules have several forms of one computation (`p2w.model.forms`). On a GPU every form is first compared with plain
float32 and then timed, forward and backward; the fastest is chosen. Without measuring, the form with fewer operations is
chosen, and it too is compared with plain float32. All ranks test the forms at the same time and choose the same ones: a
form that fails on any rank is left out, and the slowest rank's time counts.

RUN/kernels.json records the choice. A continued run uses the same forms again while device, versions, precision and sizes
are the same, because forms differ by rounding.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import copy
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from p2w.config import Config
from p2w.files import write_atomic
from p2w.log import Log
from p2w.model.forms import FOLDED, PLAIN, Formed, formed_modules, set_forms
from p2w.model.norm import BatchNorm3d
from p2w.model.unet3d import UpBlock, folded_by_count
from p2w.train.isolated_layer import (
    LayerCall,
    RandomTensors,
    Shape,
    backward_scale,
    distinct_samples,
    float32_arithmetic,
    forward_backward,
    in_channels_last,
    poison_free_memory,
    run_arithmetic,
    trace_layers,
)
from p2w.train.optim import Precision
from p2w.train.preflight import CheckKey, machine_key, passed_before, record_pass
from p2w.world import World

RECORD = "kernels.json"
TOLERANCE = {"fp32": 1e-3, "tf32": 0.01}  # share of the largest sample's Euclidean norm
TOLERANCE_16 = 0.02  # the same for bf16 and fp16, where rounding alone gives up to 0.003
TIMES_PLAIN = 3.0  # where the plain form's own rounding error is large, this many times it is allowed
GAIN = 0.02  # a form must be faster than the plain one by this share
ROUNDS, CALLS = 5, 4  # measurements of each form, and passes in each of them

Rule = Literal["measure", "count", "plain"]
Warn = Callable[[str], None]
Timer = Callable[[Callable[[], None]], float]  # calls the function and returns the seconds that it took
LayerKind = tuple[Any, ...]


@dataclass(frozen=True)
class Choice:
    """`forms` is {module name: form} for every module that has several; `line` is for the log; `record` for kernels.json."""

    forms: dict[str, str]
    line: str
    record: dict[str, Any]

    def write(self, run: Path) -> None:
        """Write kernels.json into the run folder. Raises OSError."""
        write_atomic(run / RECORD, json.dumps(self.record, indent=2))


def read_form_record(run: Path, warn: Warn) -> dict[str, Any] | None:
    """The content of RUN/kernels.json; None when there is no file or it cannot be read."""
    path = run / RECORD
    try:
        record = json.loads(path.read_text())
        forms = record["forms"]
        if all(isinstance(form, str) for form in forms.values()):
            return dict(record)
        warn(f"{path}: its forms are not text; forms are chosen again")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        warn(f"{path}: cannot be read ({error}); forms are chosen again")
    return None


def choose_run_forms(
    config: Config, model: nn.Module, run: Path, world: World, precision: Precision, log: Log
) -> Choice:
    """Set every layer of `model` to the form that is fastest here, or that this run used so far. A collective.

    The rule follows from the configuration. On a CPU, layers keep PyTorch's usual form, so that a run gives the same bits
    as any other run of the same settings. The choice is returned and not yet written into the folder `run`.
    """
    rule: Rule = "measure"
    if config.train.kernels == "plain" or world.device.type == "cpu":
        rule = "plain"
    elif config.train.deterministic:
        rule = "count"
    shape = (config.data.batch // world.size // config.optim.accumulate, 1, *config.pretext.size)
    recorded = read_form_record(run, log.warn) if world.is_main else None
    choice = choose_forms(model, shape, precision, world, log.warn, rule=rule, recorded=recorded)
    set_forms(model, choice.forms)
    if world.device.type != "cpu":
        log.line(choice.line)
    return choice


def choose_forms(
    model: nn.Module, shape: Shape, precision: Precision, world: World, warn: Warn, *,
    rule: Rule, recorded: dict[str, Any] | None = None, timer: Timer | None = None,
) -> Choice:  # fmt: skip
    """Choose the form of every module of `model` that has several. A collective: all ranks choose the same forms.

    `shape` (B, C, D, H, W) is this rank's network input of one pass. `rule` "measure" times the forms on a GPU and counts
    operations on a CPU; "count" counts operations; "plain" takes PyTorch's usual operations. `recorded` is what
    `read_form_record` returned on rank 0. `timer` replaces the GPU's clock, on any device. The model is not changed.
    Raises what the plain form raises.
    """
    if rule == "measure" and world.device.type != "cuda" and timer is None:
        rule = "count"
    modules = dict(formed_modules(model))
    facts: dict[str, Any] = {
        "device": world.machine()["device"], "torch": torch.__version__, "precision": precision.name,
        "input": list(shape), "channels_last": in_channels_last(model), "rule": rule,
    }  # fmt: skip
    if rule == "plain":  # nothing to compare; a trace would import SymPy, half of a start on a CPU
        forms = dict.fromkeys(modules, PLAIN)
        return Choice(forms, "forms           plain, as asked for", {**facts, "forms": forms, "ms": {}})
    calls: dict[str, LayerCall] = {}
    for one in trace_layers(model, shape, (Formed,)):
        if one.name in modules:
            calls.setdefault(one.name, one)
    known, why_again = _recorded(calls, facts, recorded, world)
    tester = _FormTester(precision, world, facts["channels_last"], warn)
    table: dict[str, dict[str, float]] = recorded.get("ms", {}) if known and recorded else {}
    if known is not None:
        forms, how = tester.replace_failing(calls, known), f"as recorded in {RECORD}"
    elif rule == "measure":
        seconds = tester.seconds(calls, timer or gpu_seconds)
        table = {name: _milliseconds(one, seconds) for name, one in calls.items()}
        forms = {name: _fastest(one, seconds) for name, one in calls.items()}
        how = _gain(forms, table, facts)
    else:
        forms = tester.replace_failing(calls, {name: _by_count(one) for name, one in calls.items()})
        how = "by the number of operations, not measured"
    line = f"forms           {_counted(calls, forms)}, {how}{f' ({why_again})' if why_again else ''}"
    return Choice(forms, line, {**facts, "forms": forms, "ms": table})


def layer_kind(one: LayerCall) -> LayerKind:
    """A value that is equal for two modules that do the same arithmetic at the same size."""
    module: Formed = one.module
    weights = tuple((tuple(weight.shape), weight.requires_grad) for weight in module.parameters())
    return (type(module).__name__, str(module), module.possible_forms(), weights, one.input_shape)


def gpu_seconds(call: Callable[[], None]) -> float:
    """Seconds of GPU time that `call` takes. A wait on the GPU comes first, and launches are queued meanwhile."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(5_000_000)  # clock cycles, some milliseconds
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class _FormTester:
    """Compares forms with plain float32 and times them on every rank, and shares the results among all ranks."""

    def __init__(self, precision: Precision, world: World, channels_last: bool, warn: Warn) -> None:
        self.precision, self.world, self.channels_last, self.warn = precision, world, channels_last, warn
        self.warned: set[str] = set()
        self.tolerance = TOLERANCE.get(precision.name, TOLERANCE_16)

    def replace_failing(self, calls: dict[str, LayerCall], forms: dict[str, str]) -> dict[str, str]:
        """`forms`, with "plain" in place of those that are wrong or fail on any rank. Passed checks are cached."""
        asked = {
            (layer_kind(calls[name]), form): calls[name] for name, form in forms.items() if form != PLAIN
        }
        if not asked:
            return forms
        facts: CheckKey = {
            **machine_key(self.world), "precision": self.precision.name, "channels_last": self.channels_last,
            "forms": sorted(map(repr, asked)),
        }  # fmt: skip
        own = dict.fromkeys(asked, 0.0)
        if not passed_before(facts, self.warn):
            own = {
                (kind, form): 0.0 if self._correct_forms(one, (form,)) else math.inf
                for (kind, form), one in asked.items()
            }
            if not any(own.values()):
                record_pass(facts, self.warn)
        found = self._on_all(own)
        return {
            name: PLAIN if found.get((layer_kind(calls[name]), form)) else form
            for name, form in forms.items()
        }

    def seconds(self, calls: dict[str, LayerCall], timer: Timer) -> dict[tuple[LayerKind, str], float]:
        """Seconds of a forward and backward pass of each distinct module in each form; infinite for a form that fails."""
        found: dict[tuple[LayerKind, str], float] = {}
        for one in {layer_kind(one): one for one in calls.values()}.values():
            kind, device = layer_kind(one), self.world.device
            # The same list on every rank
            found |= {(kind, form): math.inf for form in one.module.possible_forms()}
            here = one.module.forms(device, self.precision.dtype, one.input_shape[0])
            correct = (PLAIN, *self._correct_forms(one, tuple(form for form in here if form != PLAIN)))
            found |= {(kind, form): value for form, value in self._timed(one, correct, timer).items()}
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return self._on_all(found)

    def _on_all(self, found: dict[tuple[LayerKind, str], float]) -> dict[tuple[LayerKind, str], float]:
        """The largest value over the ranks for each key; every rank has the same keys in the same order."""
        if not found:
            return found
        own = torch.tensor(list(found.values()), dtype=torch.float64)[None]
        everywhere = dict(zip(found, self.world.gather(own).amax(0).tolist(), strict=True))
        for (kind, form), value in everywhere.items():
            if form != PLAIN and math.isinf(value) and math.isfinite(found[kind, form]):
                self._warn_once(form, "is wrong or fails on another rank")
        return everywhere

    def _correct_forms(self, one: LayerCall, forms: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `forms` that run here and agree with plain float32, in output and gradients, within rounding."""
        device = self.world.device
        here = one.module.forms(device, self.precision.dtype, one.input_shape[0])
        forms = tuple(form for form in forms if form in here)
        if not forms:
            return ()
        samples = one.input_shape[0] if device.type == "cuda" else 1
        given, out = self._sizes(one, samples)
        draw, number = (
            RandomTensors(self.precision, device, self.channels_last),
            distinct_samples(samples, given, out),
        )
        copies = samples // number
        module = self._training_copy(one, draw)
        x, by = draw.normal((number, *given[1:])), draw.normal((number, *out[1:])) * backward_scale(copies)
        with float32_arithmetic():
            expected = _results(module, PLAIN, x, by, copies)
        x, by = draw.repeat(x, samples), draw.repeat(by, samples)
        rounding = self._error(module, PLAIN, x, by, expected)
        tolerance = max(self.tolerance, TIMES_PLAIN * rounding if math.isfinite(rounding) else 0.0)
        correct = []
        for form in forms:
            try:
                poison_free_memory(device, x, by)
                error = self._error(module, form, x, by, expected)
            except Exception as failure:  # whatever a compiler or a kernel raises
                self._warn_once(form, f"does not run here ({_first_line(failure)})")
                continue
            if error <= tolerance:  # false for NaN
                correct.append(form)
            else:
                self._warn_once(
                    form,
                    f"differs from plain float32 by {error:.3g} in {one.name} (rounding explains {tolerance:.2g})",
                )
        return tuple(correct)

    def _warn_once(self, form: str, what: str) -> None:
        """Warn once for each form, because a kernel that fails will fail in every module."""
        if form not in self.warned:
            self.warned.add(form)
            self.warn(f"form {form} {what}; it is left out, at some cost in speed")

    def _error(self, module: Formed, form: str, x: Tensor, by: Tensor, expected: list[Tensor]) -> float:
        """The largest difference of any result from the expected one; infinite where results are missing."""
        with run_arithmetic(self.precision, self.world.device):
            found = _results(module, form, x, by, 1)
        if len(found) != len(expected):
            return math.inf
        errors = [_difference(value, right) for value, right in zip(found, expected, strict=True)]
        return max(errors) if all(map(math.isfinite, errors)) else math.nan

    def _timed(self, one: LayerCall, forms: tuple[str, ...], timer: Timer) -> dict[str, float]:
        """Median seconds of a pass for each form; the forms take turns."""
        if len(forms) == 1:  # nothing to choose from
            return {}
        draw = RandomTensors(self.precision, self.world.device, self.channels_last)
        given, out = self._sizes(one, one.input_shape[0])
        module, number = self._training_copy(one, draw), distinct_samples(given[0], given, out)
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
                    if turn:  # the first turn compiles and searches for kernels
                        found[form].append(seconds)
        return {form: statistics.median(values) for form, values in found.items()}

    def _training_copy(self, one: LayerCall, draw: RandomTensors) -> Formed:
        """A copy in training mode, with noise on the weights (none stays 0 or 1) and batch norm on this rank alone."""
        module: Formed = copy.deepcopy(one.module).train()
        for inner in module.modules():
            if isinstance(inner, BatchNorm3d):
                inner.over_ranks = False
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_((weight + 0.1 * draw.normal(tuple(weight.shape))).to(draw.value_dtype))
        return module

    def _sizes(self, one: LayerCall, samples: int) -> tuple[Shape, Shape]:
        """Shapes (B, C, D, H, W) of the input and of the output of `formed` for it."""
        with torch.no_grad():
            ghost = copy.deepcopy(one.module).to("meta").eval()
            ghost.form = PLAIN
            given = (samples, *one.input_shape[1:])
            return given, tuple(ghost.formed(torch.empty(given, device="meta")).shape)


def _results(module: Formed, form: str, x: Tensor, by: Tensor, copies: int) -> list[Tensor]:
    """Output, gradients of input and weights, and running statistics of a pass in `form`; the module is not changed.

    Weight gradients are multiplied by `copies`, the number of times that the full batch repeats these samples.
    """
    own = copy.deepcopy(module)
    own.form = form
    weights = [weight for weight in own.parameters() if weight.requires_grad]
    output, inputs, *gradients = forward_backward(own.formed, weights, x, by)
    statistics_after = [buffer for buffer in own.buffers() if buffer.is_floating_point()]
    return [output, inputs, *(gradient * copies for gradient in gradients), *statistics_after]


def _difference(value: Tensor, right: Tensor) -> float:
    """The largest distance between rows of `value` and `right`, over the largest norm of a row of `right`.

    A row is an entry of the first axis; `value` may repeat the rows of `right`. The Euclidean norm of rows is compared,
    not single values: where a ReLU's input rounds to the other side of 0, a single gradient may be lost completely.
    """
    rows = right.reshape(len(right), -1)
    pieces = (piece.reshape(len(piece), -1).float() for piece in value.split(len(right)))
    worst = torch.stack([(piece - rows).norm(dim=1).max() for piece in pieces]).max()
    return float(worst / rows.norm(dim=1).max().clamp(min=1e-30))


def _recorded(
    calls: dict[str, LayerCall], facts: dict[str, Any], recorded: dict[str, Any] | None, world: World
) -> tuple[dict[str, str] | None, str]:
    """Rank 0's recorded forms, on every rank, when they fit this start; else None and the reason, if there is a record."""
    indices, why = [-1] * len(calls), ""
    if recorded is not None:
        changed = [
            f"{name} was {recorded.get(name)}, is {value}"
            for name, value in facts.items()
            if recorded.get(name) != value
        ]
        forms = recorded["forms"]
        pairs = [(one.module.possible_forms(), forms.get(name)) for name, one in calls.items()]
        if changed:
            why = f"chosen again: {'; '.join(changed)}"
        elif set(forms) != set(calls) or any(form not in possible for possible, form in pairs):
            why = f"chosen again: {RECORD} names other modules"
        else:
            indices = [possible.index(form) for possible, form in pairs]
    indices = world.gather(torch.tensor(indices)[None])[0].tolist()
    if not calls or min(indices) < 0:
        return None, why
    return {
        name: one.module.possible_forms()[index]
        for (name, one), index in zip(calls.items(), indices, strict=True)
    }, ""


def _by_count(one: LayerCall) -> str:
    """The form with fewer operations."""
    module, (samples, _, *size) = one.module, one.input_shape
    if isinstance(module, UpBlock) and folded_by_count(module, samples, (size[0], size[1], size[2])):
        return FOLDED
    return PLAIN


def _fastest(one: LayerCall, seconds: dict[tuple[LayerKind, str], float]) -> str:
    """The fastest form, if it is faster than the plain one by more than the noise of measurements, GAIN."""
    times = {form: seconds[layer_kind(one), form] for form in one.module.possible_forms()}
    best = min(times, key=lambda form: times[form])
    return best if times[best] < (1 - GAIN) * times[PLAIN] else PLAIN


def _milliseconds(one: LayerCall, seconds: dict[tuple[LayerKind, str], float]) -> dict[str, float]:
    """{form: milliseconds a pass} of every form that was measured."""
    times = {form: seconds[layer_kind(one), form] for form in one.module.possible_forms()}
    return {form: round(1e3 * value, 4) for form, value in times.items() if math.isfinite(value)}


def _gain(forms: dict[str, str], table: dict[str, dict[str, float]], facts: dict[str, Any]) -> str:
    """Text: the time of the modules with several forms, in the chosen forms and in the plain ones."""
    chosen = sum(table[name].get(form, 0.0) for name, form in forms.items())
    plain = sum(times.get(PLAIN, 0.0) for times in table.values())
    where = f"{facts['input'][0]} samples in {facts['precision']} on {facts['device']}"
    return f"{chosen:.2f} ms a pass instead of {plain:.2f}, measured with {where}"


def _counted(calls: dict[str, LayerCall], forms: dict[str, str]) -> str:
    """Text: how many modules use each form, of those that could use it."""
    used = Counter(form for form in forms.values() if form != PLAIN)
    possible = Counter(form for one in calls.values() for form in one.module.possible_forms())
    return (
        ", ".join(f"{form} in {count} of {possible[form]} modules" for form, count in used.items()) or "plain"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
