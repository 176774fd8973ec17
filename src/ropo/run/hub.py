"""The model on the hub, when it is asked for.

In: options, the finished output folder. Out: a commit with the model's files and its card; nothing else of the folder
is ever sent: no data, ledger, report or review decisions.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import HfApi, constants

from ropo.config import ROPOConfig
from ropo.processes import meet
from ropo.provenance import RunError
from ropo.run.rounds import Round

logger = logging.getLogger(__name__)


class UploadError(RunError):
    """The hub did not take the model; the message says why, and that the model is on the disk, if it is."""


def check_upload(args: ROPOConfig) -> None:
    """Refuse what cannot be uploaded, without asking anybody.

    Raises:
        ValueError: If the hub's library is told to stay offline, or options of an upload stand without `push_to_hub`.
    """
    given = ("hub_model_id", "hub_private_repo", "hub_revision")
    if not args.push_to_hub and (idle := [name for name in given if getattr(args, name) is not None]):
        raise ValueError(f"{idle[0]} needs push_to_hub, without which nothing is uploaded. Add --push_to_hub.")
    if args.push_to_hub and constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub needs the hub; got HF_HUB_OFFLINE=1. Unset it, or leave out push_to_hub.")


def open_repository(args: ROPOConfig) -> str | None:
    """Make the repository before anything is computed, so that a missing token or right is told at once.

    Returns:
        Its id; None without `push_to_hub`, and in all processes but one.

    Raises:
        UploadError: If the hub refuses, or cannot be reached.
    """
    if not args.push_to_hub or not PartialState().is_main_process:
        return None
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    with _explained(f"push_to_hub needs a repository that it may write to; got {name}"):
        api = HfApi(token=args.hub_token)
        found: str = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        if args.hub_revision is not None:
            api.create_branch(found, branch=args.hub_revision, exist_ok=True)
    logger.info("The model will be uploaded to %s when it is finished.", found)
    return found


def upload(repository: str | None, args: ROPOConfig, rounds: Sequence[Round]) -> None:
    """Send the files of the finished model in the output folder, and the card.

    Args:
        repository: What `open_repository` gave.
        args: Options.
        rounds: Finished ones; what the last one has trained are the files to send, by name.

    Raises:
        UploadError: If the hub refuses, or cannot be reached.
    """
    folder = Path(str(args.output_dir))
    if repository is not None:
        model = rounds[-1].model_folder
        names = sorted(path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())
        beside = [path.name for path in rounds[-1].model.processor_files()]
        names = [*dict.fromkeys([*names, *beside, "README.md"])]
        words = f"`hf upload {repository} {folder} . {' '.join(f'--include {name}' for name in names)}`"
        with _explained(f"The model is finished, in {folder}, but was not uploaded. Try {words}, or the same command"):
            url = HfApi(token=args.hub_token).upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=[name.replace("[", "[[]") for name in names],
                revision=args.hub_revision,
                commit_message=f"Model aligned by ropo ({args.loss})",
            )
        logger.info("Uploaded %d files to %s.", len(names), url)
    meet()


@contextmanager
def _explained(begin: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of whichever HTTP client the hub's library uses
        raise UploadError(f"{begin}: {error}") from error
