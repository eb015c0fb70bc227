"""A folder of weights goes to a hub, only when that is asked for."""

from pathlib import Path

from preceptor.core.errors import UserError, WorkError


def check_token() -> None:
    """Refuse to begin what would end at a hub's door."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("push: the hub wants a token that may write: set HF_TOKEN")


def push(folder: Path, name: str) -> str:
    """Upload a folder to the repository `name` (owner/name), a private one if it is made now; returns its address.

    Raises:
        WorkError: the hub refuses it, or can't be reached.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        url = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of Preceptor")
    except Exception as error:  # its errors, and those of what it sends with, share no base class
        why = next(iter(str(error).strip().splitlines()), "")
        raise WorkError(
            f"push: {name}: {type(error).__name__}: {why}; see to name, HF_TOKEN and HF_ENDPOINT, and run it again: "
            "only what is missing there is sent"
        ) from error
    return str(url)
