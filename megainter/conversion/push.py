"""A converted folder to a repository of the Hugging Face Hub, through its own client."""

import re
from pathlib import Path

import megainter
from megainter.errors import UsageError, one_line
from megainter.weights import is_offline, out_of_reach, status_of

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", flags=re.ASCII)


def require_hub(repository: str) -> None:
    """``UsageError`` where nothing could be pushed to ``repository`` from here: asked before anything is converted."""
    from huggingface_hub import get_token

    if not _NAME.fullmatch(repository):
        raise UsageError(f"--push {repository!r:.120}: give OWNER/NAME, a repository of the Hub")
    if is_offline():
        raise UsageError("--push needs the network, and HF_HUB_OFFLINE forbids it; give a folder to write, and push it later")
    if get_token() is None:
        raise UsageError("--push needs a token that may write: set HF_TOKEN, or run `hf auth login`")


def push_folder(folder: Path, repository: str, private: bool | None = None) -> str:
    """Commit all files of ``folder`` to ``repository``, which is made where it is not there; returns the commit's address.

    ``private`` is for a new repository (None: as the account's settings say). ``UsageError`` in one line where the Hub cannot be reached,
    the token may not write there, or the Hub refuses something.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    told = f"InterBERT, by megainter {megainter.__version__}"
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        made = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=told)
    except Exception as error:  # the network library's errors are not the Hub's, and change with its versions
        raise UsageError(f"--push {repository}: {_reason(error, hub.endpoint)}; nothing was committed") from None
    return str(made.commit_url)


def _reason(error: Exception, endpoint: str) -> str:
    """The client wraps a failed upload of one file in an error that only names the file."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    status = status_of(cause)
    if status in (401, 403):
        return f"{endpoint} answers {status}: the token (HF_TOKEN) is not valid, or may not write there"
    if not isinstance(cause, ValueError) and (reason := out_of_reach(cause)):  # of the client a ValueError is about what is sent
        return f"{reason} ({endpoint})"
    return one_line(str(cause) or type(cause).__name__)[:400]
