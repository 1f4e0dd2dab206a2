"""Node, rank, device and collectives: made once by `World.start`, then passed on. Only this module reads the environment.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without them there is one process and no group.

Batches are small and sets are small, a result is compared with others by a t-test, and it must not depend on the number of
ranks. So ranks share what they compute:

- `total` sums over ranks and lets the gradient through: soft Dice is a ratio of sums over the whole batch;
- `p2w.model.norm.synchronise_batch_norm` makes batch norm average over all ranks;
- `average_gradients` is one all-reduce after the backward pass. DDP would hide it behind the backward pass, but lays its
  buckets out anew after the first one, so that a trial which continues after an interruption would differ in its last bits.
"""

import contextlib
import gc
import json
import os
import platform
import secrets
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import crc32c
import torch
import torch.distributed as dist
from torch import Tensor, nn

from p2w.errors import UserError
from p2w.resources import total_memory, usable_cores


@dataclass(frozen=True)
class World:
    """Where this process stands. `device_reason` says why the device was chosen."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    device: torch.device
    device_reason: str
    agent: int = 0  # process id of the torchrun that started this rank; 0 without one
    store: dist.Store | None = None  # where the ranks met; None in one process

    WAIT_S: ClassVar[float] = 1800.0  # for a collective that others do not join
    MEET_S: ClassVar[float] = 300.0  # for all ranks to be there

    @property
    def is_main(self) -> bool:
        """Rank 0 writes the run folder; no other rank does."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this process prints help and what is refused: one process a node, and always one that is alone.

        LOCAL_RANK without torchrun chooses the GPU of a process that was started beside others, each with a log of its own.
        """
        return self.size == 1 or self.local_rank == 0

    @staticmethod
    def from_env() -> "World":
        """Read rank and device from the environment, without a process group.

        Raises UserError when a node has fewer CUDA devices than local ranks.
        """
        rank = int(os.environ.get("RANK", "0"))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        asked = os.environ.get("P2W_DEVICE", "")
        if asked not in ("", "cpu", "cuda"):
            raise UserError(f"P2W_DEVICE={asked}: must be cpu or cuda; unset it to take what the machine has")
        if asked != "cpu" and torch.cuda.is_available():
            count = torch.cuda.device_count()
            if local_rank >= count:
                raise UserError(
                    f"{socket.gethostname()}: local rank {local_rank} but {count} CUDA device(s); one process "
                    f"a device: torchrun --nproc_per_node={count}"
                )
            device, reason = torch.device("cuda", local_rank), torch.cuda.get_device_name(local_rank)
        elif asked == "cuda":
            raise UserError("P2W_DEVICE=cuda: no CUDA device here; unset it to run on the CPU")
        else:
            device, reason = torch.device("cpu"), "P2W_DEVICE=cpu" if asked else "no CUDA device here"
        agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        return World(rank, size, local_rank, local_size, socket.gethostname(), device, reason, agent)

    @staticmethod
    def start(timeout_s: float = WAIT_S, meet_s: float = MEET_S, deterministic: bool = False) -> "World":
        """Read the environment and join the process group: NCCL for GPU tensors, gloo for CPU tensors.

        A collective may take `timeout_s`, the ranks meet within `meet_s`. `deterministic`: a GPU gives the same bits every
        time, more slowly. Raises UserError when the ranks do not meet.
        """
        world = World.from_env()
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
            # Shapes stay the same: try the 3D convolutions once, take the fastest. Which one that is, a race decides.
            torch.backends.cudnn.benchmark = not deterministic
            if deterministic:
                _same_bits()
        if world.size > 1:
            backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
            device_id = world.device if world.device.type == "cuda" else None
            timeout = timedelta(seconds=timeout_s)
            world = replace(world, store=_meet(world, timedelta(seconds=meet_s)))
            dist.init_process_group(
                backend, store=world.store, rank=world.rank, world_size=world.size, timeout=timeout,
                device_id=device_id,
            )  # fmt: skip
        return world

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce in place, summed over ranks; any shape, on the CPU or this rank's device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank when any of them raises `flag`; a CPU tensor over gloo, so a GPU is not waited for."""
        return bool(self.sum(torch.tensor([float(flag)])).item())

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate equally shaped tensors of all ranks along the first axis, in rank order."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group. Drop every reference to a DDP model and its optimizer before calling.

        With gloo, a thread that frees work while the interpreter finalises aborts the process (seen in 15 of
        40 runs of torch 2.13 on Python 3.11); collecting first and leaving together avoids it.
        """
        if self.size > 1 and dist.is_initialized():
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()

    @staticmethod
    def leave(code: int = 0) -> NoReturn:
        """End the process at once, all that it holds being closed; nothing is finalised.

        The interpreter would free a million objects of torch one by one: 1.5 s of processor time (torch 2.13, Python 3.11),
        for which a scheduler that has told the run to stop, or torchrun with its other ranks, would wait.
        """
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)

    def connection(self, timeout_s: float) -> dist.Store:
        """A connection of its own to the store, for a thread: a call that waits on another does not hold it up."""
        assert self.store is not None
        store = self.store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        store.set_timeout(timedelta(seconds=timeout_s))
        return store

    def abort(self, code: int, text: str, at_once: bool = False) -> NoReturn:
        """After an error: say it and end at once, without a collective that the others may never join.

        With several ranks, or `at_once` from a thread, the interpreter is not finalised either, see `close`. torchrun
        repeats the first line of `text`; an empty one is left to another rank to say.
        """
        if text:
            self.report(text)
        if self.size > 1 or at_once:
            self.leave(code)
        sys.exit(code)

    def end_neighbour(self, pid: int) -> None:
        """SIGKILL a rank that this rank's torchrun has started, and no other process: ids mean nothing across containers."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if self.agent and parent == self.agent == os.getppid():
                os.kill(pid, signal.SIGKILL)

    @staticmethod
    def lost_peer(error: BaseException) -> bool:
        """Whether an error only says that another rank has left a collective."""
        said = str(error)
        return isinstance(error, RuntimeError) and any(
            sign in said for sign in ("by peer", "Broken pipe", "gloo", "remote process exited")
        )

    @staticmethod
    def reason(error: BaseException) -> str:
        """The first sentence of what torch says of a failure between ranks, without the C++ stack behind it."""
        first = (str(error) or type(error).__name__).splitlines()[0]
        return first.split(". This may indicate")[0].rstrip(".")

    def orphaned(self) -> bool:
        """True once the torchrun that started this rank is gone: nobody would restart, stop or report it any more."""
        return self.agent not in (0, os.getppid())

    def report(self, text: str) -> None:
        """Write `text` to stderr in one piece, because other ranks write there too; torchrun gets its first line."""
        os.write(2, f"{text}\n".encode())
        self.report_to_torchrun(text.partition("\n")[0])

    @staticmethod
    def report_to_torchrun(line: str) -> None:
        """Have torchrun end its report with `line`: else a page of its own traceback hides what this rank has said."""
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            Path(path).write_text(json.dumps({"message": line, "timestamp": str(int(time.time()))}))

    def describe(self) -> str:
        """One line for the log: how many processes, where, on what."""
        nodes = self.size // max(1, self.local_size)
        what = f"{self.size} process(es) on {nodes} node(s)" if self.size > 1 else "one process"
        threads = f", {torch.get_num_threads()} thread(s) each" if self.device.type == "cpu" else ""
        return f"{what}, {self.device.type} ({self.device_reason}){threads}"

    def machine(self) -> dict[str, str | int]:
        """What the figures of a run came from: host, devices, versions."""
        return {
            "host": self.host,
            "world_size": self.size,
            "nodes": max(1, self.size // max(1, self.local_size)),
            "device": self.device_reason if self.device.type == "cuda" else _processor(),
            "cores": usable_cores(),
            "memory_gib": round(total_memory() / 2**30),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        }


def _same_bits() -> None:
    """Have this process's GPU take kernels that add in a fixed order; torch warns of an operation that has none.

    It also warns of max pooling's backward, which adds atomically. Windows that do not overlap, as the U-Net's, give each
    voxel one summand, so its bits stay the same all the same; those of the ResNets and of I3D overlap.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it is first used
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch's stub lacks it


def _processor() -> str:
    """The CPU's name; Linux tells it to nobody but readers of this file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def variable(name: str) -> str:
    """A variable of the environment; empty when it is not set."""
    return os.environ.get(name, "")


def variables(**more: str) -> dict[str, str]:
    """The environment for a child process: this one's and `more`."""
    return os.environ | more


def _meet(world: World, timeout: timedelta) -> dist.Store:
    """A store that the ranks of this start have to themselves.

    torchrun (torch 2.13) keeps one store over its restarts and hands it out bare: ranks that come back read the
    addresses that a dead attempt left, and wait for them for ever (half of the restarts tried). So every rank draws a
    word, rank 0 strings the words together until each rank has found its own in it, and the keys of this start begin
    with that. Raises UserError when the ranks do not meet in time.
    """
    place = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    try:
        return _meet_at(place, world, timeout)
    except (RuntimeError, ValueError, TimeoutError) as error:  # torch's DistError among them
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"rank {world.rank} on {world.host}: could not meet the other ranks at {place} (MASTER_ADDR:MASTER_PORT) "
            f"within {timeout.total_seconds():.0f} s: {World.reason(error)}; rank 0 must run on that host, its port be "
            "free and reachable from every node, and all nodes be started together"
        ) from error


def _meet_at(place: str, world: World, timeout: timedelta) -> dist.Store:
    """`_meet`, with torch's own errors."""
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
    own, deadline = secrets.token_hex(4), time.monotonic() + timeout.total_seconds()
    store.set(f"word/{world.rank}", own)
    store.set(f"seen/{world.rank}", "")
    while time.monotonic() < deadline:
        if world.is_main:
            words = ".".join(store.get(f"word/{rank}").decode() for rank in range(world.size))
            store.set("words", words)
        words = store.get("words").decode()
        if own in words:
            store.set(f"seen/{world.rank}", words)
        if world.is_main and all(store.get(f"seen/{r}").decode() == words for r in range(world.size)):
            store.set("met", words)
        met = store.get("met").decode() if store.check(["met"]) else ""
        if own in met:
            return dist.PrefixStore(met, store)
        time.sleep(0.01)
    raise UserError(
        f"rank {world.rank} on {world.host}: {world.size} ranks did not meet at {place} within "
        f"{timeout.total_seconds():.0f} s; start all nodes together, with the same number of processes"
    )


class _AllReduceSum(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: every rank computes the same loss from the total."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Sum over ranks; `values` is left as it is."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The sum over ranks of what each wants."""
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def all_reduce_sum(values: Tensor, world: World) -> Tensor:
    """The sum over all ranks, any shape; differentiable. A loss made of it stands for the mean of the ranks' losses."""
    return values if world.size == 1 else _AllReduceSum.apply(values)


def average_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """The mean over ranks, in place and in one piece; the same parameters have gradients on every rank."""
    if world.size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    pieces = (flat / world.size).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])


def gather_rows(values: Tensor, world: World, count: int) -> Tensor:
    """Row i of all ranks' rows dealt out as i = rank, rank + size, …: (n of this rank, …) -> (count, …), on every rank."""
    if world.size == 1:
        return values
    most = -(-count // world.size)
    padded = values.new_zeros((most, *values.shape[1:]))
    padded[: len(values)] = values
    everyone = world.gather(padded).view(world.size, most, *values.shape[1:])
    return everyone.transpose(0, 1).reshape(world.size * most, *values.shape[1:])[:count]


def weights_checksum(network: nn.Module) -> str:
    """Of all its weights, on the CPU: ranks start from the same, or gradients are averaged that do not belong together."""
    crc = 0
    for value in network.state_dict().values():
        crc = crc32c.crc32c(value.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"crc32c:{crc:08x}"
