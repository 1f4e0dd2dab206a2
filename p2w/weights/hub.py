"""Weights on the Hugging Face Hub, by name: `hf://org/name[@revision][/file]`.

p2w.load("hf://org/name")                  the newest commit of its main branch
p2w.load("hf://org/name@v1.0")             a tag, a branch or a commit
--init hf://org/name/checkpoint_final.pth  a file that `p2w inspect` can read; without one, model.safetensors of `p2w push`

A name is pinned to a commit as soon as it is resolved, and runs and cards record it so. Files stay in the Hub's own cache;
with HF_HUB_OFFLINE=1, or where no network is, they come from there. Needs the extra parts2whole[hub]. HF_ENDPOINT, HF_HOME
and HF_TOKEN are read by the client; no token is printed or stored here.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from p2w.errors import UserError

SCHEME = "hf://"
WEIGHTS = "model.safetensors"
NAME = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.+))?")  # Path("hf://a/b") has one stroke


@dataclass(frozen=True)
class HubName:
    """A file of a repository at a revision: a branch, a tag or a commit; None: the main branch."""

    repo: str
    revision: str | None = None
    file: str = WEIGHTS

    def __str__(self) -> str:
        """As it is typed."""
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{SCHEME}{self.repo}{at}" + ("" if self.file == WEIGHTS else f"/{self.file}")


def is_hub_name(name: str | Path) -> bool:
    """Whether a name of weights is one of the Hub's."""
    return str(name).startswith("hf:/")


def parse_hub_name(name: str | Path) -> HubName:
    """`hf://org/name[@revision][/file]` as its parts. Raises UserError for anything else."""
    found = NAME.fullmatch(str(name))
    if found is None or (found[3] and ".." in found[3].split("/")):
        raise UserError(
            f"{name}: must be hf://organisation/name, hf://organisation/name@revision or either with /file"
        )
    return HubName(found[1], found[2], found[3] or WEIGHTS)


def hub_client() -> ModuleType:
    """The package huggingface_hub. Raises UserError where it is not installed."""
    try:
        import huggingface_hub  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise UserError("hf:// needs huggingface_hub: pip install 'parts2whole[hub]'") from error
    return huggingface_hub


def download(name: str | Path) -> tuple[Path, HubName]:
    """The file in the local cache, downloaded if it is not there, and its name pinned to the commit.

    Raises UserError in one line: no such repository, revision or file, no permission, no network and not in the cache.
    """
    wanted, hub = parse_hub_name(name), hub_client()
    try:
        path = Path(hub.hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision))
    except Exception as error:  # of the client itself, of its HTTP client or of the file system
        raise UserError(f"{wanted}: {hub_problem(error)}") from error
    parts = path.parts  # …/snapshots/COMMIT/FILE, which is how the cache names what it holds
    commit = parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]
    return path, replace(wanted, revision=commit)


def hub_problem(error: Exception) -> str:
    """What is wrong and what helps, in one line, without anything that the client sent."""
    cause = error.__cause__
    if type(error).__name__ == "LocalEntryNotFoundError" and isinstance(cause, Exception) and _status(cause):
        error = cause  # the Hub was reached, and refused
    kinds = {kind.__name__ for kind in type(error).__mro__}
    for name, said in PROBLEMS.items():
        if name in kinds:
            return said
    status = _status(error)
    if status in (401, 403):
        return f"the Hub says {status}: log in with a token that may do this (hf auth login, or HF_TOKEN)"
    if status is not None:
        return f"the Hub answers with status {status}; try again later, or look at the repository's page"
    if kinds & {"TransportError", "ConnectionError", "TimeoutError"}:
        return f"cannot be reached ({type(error).__name__}); check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; look at the cache below HF_HOME"
    return f"huggingface_hub fails ({type(error).__name__}); install another version of it: pip install -U huggingface_hub"


def _status(error: Exception) -> int | None:
    """The HTTP status that the Hub answered with; None where the error is of another kind."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


PROBLEMS = {  # the client's errors, the narrowest first
    "GatedRepoError": "its owner has to let you in: ask on its page, then log in (hf auth login, or HF_TOKEN)",
    "RepositoryNotFoundError": "no such repository, or a private one; log in (hf auth login, or HF_TOKEN) if it is yours",
    "RevisionNotFoundError": "no such revision; name a branch, a tag or a commit of it",
    "LocalEntryNotFoundError": "not in the local cache, and the Hub cannot be reached; check the network and HF_HUB_OFFLINE",
    "EntryNotFoundError": "no such file in it; p2w push writes model.safetensors, others are named hf://organisation/name/FILE",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set; unset it to reach the Hub",
    "HFValidationError": "is no name of a repository: organisation/name, of letters, digits, - _ .",
}


def pin(name: str, recorded: str | None = None) -> str:
    """`name` with the commit that it means now; other names of weights are returned as they are.

    `recorded` is what a run that continues was started with: the same repository and file keep its commit, unless `name`
    asks for another revision.
    """
    if not is_hub_name(name):
        return name
    wanted = parse_hub_name(name)
    if recorded is not None and is_hub_name(recorded):
        before = parse_hub_name(recorded)
        same = (before.repo, before.file) == (wanted.repo, wanted.file)
        if same and wanted.revision in (None, before.revision):
            return recorded
    return str(download(name)[1])
