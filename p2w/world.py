"""Node, rank, device and collectives: made once by `World.start`, then passed on. Only this module reads the environment.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without them there is one process and no group.

Fine-tuning has small batches and data sets, its results are compared by t-tests, and they must not depend on the number of
ranks. So there are collectives for values that belong to the whole batch:

- `all_reduce_sum` sums over ranks and is differentiable: soft Dice is a ratio of sums over the whole batch;
- `p2w.model.norm.synchronise_batch_norm` makes batch norm average over all ranks;
- `average_gradients` is one all-reduce after the backward pass. DDP would overlap it with the backward pass, but changes its
  buckets after the first step, so that a trial which resumes after an interruption would differ in the last bits.
"""

import contextlib
import gc
import json
import os
import platform
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

from p2w import meeting
from p2w.errors import SharedError, UserError
from p2w.resources import total_memory, usable_cores


@dataclass(frozen=True)
class World:
    """Rank, device and process group of this process. `device_reason` says why the device was chosen."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    device: torch.device
    device_reason: str
    agent: int = 0  # process id of the torchrun that started this rank; 0 without one
    store: dist.Store | None = None  # the process group's store; None in one process
    network: str = ""  # what was found between nodes, as text; empty on one node

    WAIT_S: ClassVar[float] = 1800.0  # seconds that a collective may wait for other ranks
    MEET_S: ClassVar[float] = 300.0  # seconds within which all ranks must start

    @property
    def is_main(self) -> bool:
        """Rank 0 writes the run folder; no other rank does."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this process prints help and refusals: local rank 0 of each node, and any run of one process.

        LOCAL_RANK without torchrun selects the GPU of one of several independent processes, each with its own log.
        """
        return self.size == 1 or self.local_rank == 0

    @staticmethod
    def from_env() -> "World":
        """Read rank and device from the environment, without a process group.

        Raises UserError when a node has fewer CUDA devices than local ranks, or a variable is not a number.
        """
        rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1, least=1)
        local_rank, local_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1, least=1)
        if rank >= size > 1:
            raise UserError(
                f"RANK={rank} of WORLD_SIZE={size}: must be below it; torchrun sets both, unset them without"
            )
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
    def start(
        timeout_s: float = WAIT_S, meet_s: float = MEET_S, deterministic: bool = False, ranks: int = 0
    ) -> "World":
        """Read the environment and join the process group: NCCL for GPU tensors, gloo for CPU tensors.

        A collective may take `timeout_s`; all ranks must have started within `meet_s`. `ranks`: how many of them join, if
        not all; the others do not call this. With `deterministic`, a GPU gives the same bits in every run, more slowly.
        Raises UserError when the ranks do not find each other.
        """
        world = World.from_env()
        if 0 < ranks < world.size:
            here = ranks - world.rank + world.local_rank  # of this node's, were it to have all that follow
            world = replace(world, size=ranks, local_size=min(world.local_size, here))
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
            # Shapes do not change, so cuDNN may time its 3D convolutions once and keep the fastest, which varies by run.
            torch.backends.cudnn.benchmark = not deterministic
            if deterministic:
                _use_deterministic_kernels()
        if world.size > 1:
            backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
            device_id = world.device if world.device.type == "cuda" else None
            timeout = timedelta(seconds=timeout_s)
            store, network = _meet(world, timedelta(seconds=meet_s))
            world = replace(world, store=store)
            if network is not None:
                chosen = _choose_interface(network)
                notes = [f"interface {chosen}"] * bool(chosen) + [network.clocks]
                world = replace(world, network="; ".join(notes))
                if world.is_main and network.apart_s:
                    world.report(f"warning: {network.clocks}")
            dist.init_process_group(
                backend, store=world.store, rank=world.rank, world_size=world.size, timeout=timeout,
                device_id=device_id,
            )  # fmt: skip
        return world

    def check_asked(self) -> None:
        """Raise UserError when fewer or more nodes have met than the job asked for: each group would train by itself.

        The number that was asked for is P2W_NODES, which slurm/pretrain.sbatch sets, else torchrun's --nnodes.
        """
        asked = os.environ.get("P2W_NODES") or os.environ.get("PET_NNODES") or ""
        asked = asked or (meeting.torchrun_nodes(self.agent) if self.agent else "")
        least, _, most = asked.partition(":")
        met = _number("GROUP_WORLD_SIZE", self.size // self.local_size or 1)
        if not least.isdigit() or int(least) <= met <= int(most if most.isdigit() else least):
            return
        here = os.environ.get("SLURMD_NODENAME") or self.host
        missing = [name for name in os.environ.get("P2W_NODE_NAMES", "").split() if name != here]
        names = f", without {', '.join(missing[:8])}" if met == 1 and missing else ""
        raise UserError(
            f"{here}: the job asked for {asked} nodes and {met} met{names}: it would train without the others, or beside "
            "them. Clocks more than 15 s apart do this to torchrun's rendezvous (compare `date` on every node), and nodes "
            "that come late: mend it, and start all nodes again"
        )

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce in place, summed over ranks; any shape, on the CPU or this rank's device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank when any of them passes True. Uses a CPU tensor over gloo, without waiting for the GPU."""
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

    def wait_for_nodes(self, what: str, nodes: int, error: str | None) -> None:
        """Wait until `nodes` ranks have come here, one of each node, which pass their `error` or ""; the others pass None.

        For work that may take longer than a collective may wait. Raises SharedError with an error that one of them has.
        """
        if self.store is None:
            if error:
                raise SharedError(error)
            return
        if error:
            self.store.set(f"{what} error", error)
        if error is not None:
            self.store.add(what, 1)
        while self.store.add(what, 0) < nodes:
            time.sleep(max(0.1, self.size / 1000))
        if self.store.check([f"{what} error"]):
            raise SharedError(self.store.get(f"{what} error").decode())

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
        """End the process at once, without finalising the interpreter; call it when all files are closed.

        The interpreter would free a million objects of torch one by one: 1.5 s of processor time (torch 2.13, Python 3.11),
        during which a scheduler that stops the run, or torchrun with its other ranks, would wait.
        """
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)

    def connection(self, timeout_s: float) -> dist.Store:
        """Another connection to the store, for a thread: it is not blocked by a call that waits on the first one."""
        assert self.store is not None
        store = self.store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        store.set_timeout(timedelta(seconds=timeout_s))
        return store

    def abort(self, code: int, text: str, at_once: bool = False) -> NoReturn:
        """Print an error and end the process, without a collective, which the others may never join.

        With several ranks, or with `at_once` from a thread, the interpreter is not finalised either, see `close`. torchrun
        repeats the first line of `text`; nothing is printed if it is empty, as when another rank prints the error.
        """
        if text:
            self.report(text)
        if self.size > 1 or at_once:
            self.leave(code)
        sys.exit(code)

    def end_neighbour(self, pid: int) -> None:
        """Kill the process `pid` if this rank's torchrun has started it; in another container the id is another process."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if self.agent and parent == self.agent == os.getppid():
                os.kill(pid, signal.SIGKILL)

    @staticmethod
    def lost_peer(error: BaseException) -> bool:
        """Whether an error only reports that another rank has left a collective."""
        said = str(error)
        return isinstance(error, RuntimeError) and any(
            sign in said for sign in ("by peer", "Broken pipe", "gloo", "remote process exited")
        )

    @staticmethod
    def reason(error: BaseException) -> str:
        """The first sentence of torch's message on a failed collective, without the C++ stack."""
        first = (str(error) or type(error).__name__).splitlines()[0]
        return first.split(". This may indicate")[0].rstrip(".")

    def orphaned(self) -> bool:
        """True once the torchrun that started this rank has ended: nothing would restart, stop or report it any more."""
        return self.agent not in (0, os.getppid())

    def report(self, text: str) -> None:
        """Write `text` to stderr in one call, since other ranks write there too; its first line goes to torchrun."""
        with contextlib.suppress(OSError):  # a full disk, or a terminal that is gone
            os.write(2, f"{text}\n".encode())
        self.report_to_torchrun(text.partition("\n")[0])

    @staticmethod
    def report_to_torchrun(line: str) -> None:
        """Make torchrun end its report with `line`; else its own traceback hides the message of this rank."""
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with contextlib.suppress(OSError):
                Path(path).write_text(json.dumps({"message": line, "timestamp": str(int(time.time()))}))

    def describe(self) -> str:
        """One line for the log: how many processes, where, on what."""
        nodes = self.size // max(1, self.local_size)
        what = f"{self.size} process(es) on {nodes} node(s)" if self.size > 1 else "one process"
        threads = f", {torch.get_num_threads()} thread(s) each" if self.device.type == "cpu" else ""
        network = f"; {self.network}" if self.network else ""
        return f"{what}, {self.device.type} ({self.device_reason}){threads}{network}"

    def machine(self) -> dict[str, str | int]:
        """Host, devices, cores, memory and versions, as recorded with the figures of a run."""
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


def _use_deterministic_kernels() -> None:
    """Make torch use kernels that add in a fixed order; it warns of operations that have none.

    It also warns of the backward pass of max pooling, which adds atomically. Pooling windows that do not overlap, as in the
    U-Net, give each voxel one summand, so that its bits are the same anyway; those of the ResNets and of I3D overlap.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it is first used
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch's stub lacks it


def _processor() -> str:
    """The CPU's name from /proc/cpuinfo, which `platform` does not read on Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def _number(name: str, default: int, least: int = 0) -> int:
    """An environment variable as an integer; unset is `default`. Raises UserError for anything else."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.strip().isascii() or not text.strip().isdigit() or int(text) < least:
        raise UserError(
            f"{name}={text}: must be an integer from {least} on; torchrun sets it, unset it without torchrun"
        )
    return int(text)


def variable(name: str) -> str:
    """An environment variable; empty when it is not set."""
    return os.environ.get(name, "")


def variables(**more: str) -> dict[str, str]:
    """The environment of this process with `more` variables, for a child process."""
    return os.environ | more


def _meet(world: World, timeout: timedelta) -> tuple[dist.Store, meeting.Network | None]:
    """A store for the ranks of this start alone, and what was found between nodes (None on one node).

    Raises UserError when the ranks do not find each other in time, or a node cannot reach another.
    """
    address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    try:
        return _meet_at(address, world, timeout)
    except (RuntimeError, ValueError, TimeoutError) as error:  # torch's DistError among them
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"rank {world.rank} on {world.host}: could not meet the other ranks at {address} (MASTER_ADDR:MASTER_PORT) "
            f"within {timeout.total_seconds():.0f} s: {World.reason(error)}; rank 0 must run on that host, its port be "
            "free and reachable from every node, and all nodes be started together"
        ) from error


def _meet_at(address: str, world: World, timeout: timedelta) -> tuple[dist.Store, meeting.Network | None]:
    """Do the work of `_meet`; errors are torch's own."""
    deadline = time.monotonic() + timeout.total_seconds()
    if world.is_main and (line := meeting.allow_open_files(world.size, world.agent)):
        world.report(f"warning: {line}")
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
    met = meeting.agree_on_prefix(store, world.rank, world.size, world.local_rank == 0, deadline)
    if met is None:
        raise UserError(
            f"rank {world.rank} on {world.host}: {world.size} ranks did not meet at {address} within "
            f"{timeout.total_seconds():.0f} s; start all nodes together, with the same number of processes"
        )
    if len(met.leaders) < 2:
        return met.store, None
    network = meeting.check_network(
        met, world.rank, world.host, os.environ.get("MASTER_ADDR", ""), timeout.total_seconds()
    )
    return met.store, network


def _choose_interface(network: meeting.Network) -> str:
    """Let gloo and NCCL use the interface that reaches the other nodes, unless the user has chosen; its name if so.

    gloo takes the address that the host's own name resolves to, which on Debian is 127.0.1.1.
    """
    try:
        default = socket.gethostbyname(socket.gethostname())
    except OSError:
        default = ""
    if not network.interface or default == network.address:
        return ""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, network.interface)
    return network.interface


class _AllReduceSum(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too, as every rank computes the same loss from the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Sum over ranks; `values` is not changed."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Sum of the gradient over ranks."""
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def all_reduce_sum(values: Tensor, world: World) -> Tensor:
    """Differentiable sum over all ranks, any shape. A loss computed from it counts as the mean of the ranks' losses."""
    return values if world.size == 1 else _AllReduceSum.apply(values)


def average_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """Replace gradients by their mean over ranks in one all-reduce; all ranks have gradients of the same parameters."""
    if world.size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    pieces = (flat / world.size).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])


def gather_rows(values: Tensor, world: World, count: int) -> Tensor:
    """Gather rows that are distributed as i = rank, rank + size, …: (n of this rank, …) -> (count, …), on every rank."""
    if world.size == 1:
        return values
    most = -(-count // world.size)
    padded = values.new_zeros((most, *values.shape[1:]))
    padded[: len(values)] = values
    everyone = world.gather(padded).view(world.size, most, *values.shape[1:])
    return everyone.transpose(0, 1).reshape(world.size * most, *values.shape[1:])[:count]


def weights_checksum(network: nn.Module) -> str:
    """CRC-32C of all weights, computed on the CPU. Ranks compare it, since all must start from the same weights."""
    crc = 0
    for value in network.state_dict().values():
        crc = crc32c.crc32c(value.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"crc32c:{crc:08x}"
