# SPDX-License-Identifier: Apache-2.0
"""Upload a saved model to the Hub: files of an allow-list only, in one commit, without secrets or local paths."""

import html
import json
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # the second, of whichever HTTP library it uses
    HfHubHTTPError,
    HTTPError,
)
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from hf_vdneuron import config
from hf_vdneuron.modeling_vdneuron import CODE_FILES


__all__ = ["push_folder", "uploadable_files"]

#: What lies beside a model and tells of it: the card, the report as data and as a page, and its figures.
CARD_NAME, DATA_NAME, PAGE_NAME, FIGURES_FOLDER = "README.md", "report.json", "report.html", "figures"

#: Weights that transformers loads by default, and their index.
_DEFAULT_WEIGHT_PATTERNS = ("model.safetensors", "model-?????-of-?????.safetensors", SAFE_WEIGHTS_INDEX_NAME)

#: And variants such as `model.fp16.safetensors`; not the teacher of a checkpoint.
_WEIGHT_PATTERNS = (
    *_DEFAULT_WEIGHT_PATTERNS,
    "model.*.safetensors",
    "model.*-?????-of-?????.safetensors",
    "model.safetensors.index.*.json",
)

#: Whatever may be uploaded. All else stays where it is.
_ALLOWED_PATTERNS = (
    *_WEIGHT_PATTERNS,
    CONFIG_NAME,
    "generation_config.json",
    *(path.name for path in CODE_FILES),
    config.FILE_NAME,
    # The tokenizer
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    # What people read
    CARD_NAME,
    DATA_NAME,
    PAGE_NAME,
    f"{FIGURES_FOLDER}/*.png",
)

#: Files that are looked through for secrets before they go.
_TEXT_SUFFIXES = frozenset({".json", ".md", ".html", ".py", ".txt", ".jinja"})

#: An access token of the Hub: its prefix and at least 30 letters and digits.
_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}")

#: Tensors that only a variational layer has: its log-variances.
_VARIATIONAL_SUFFIX = ".log_var"

#: Line of a card's metadata that holds the name that its text loads the model by.
_CARD_NAME_LINE = re.compile(r"(?m)^(model-index:\n- name: )(.*)$")

#: Answers of the Hub to a token that is missing or wrong, and to one that may not write there.
_UNAUTHORIZED, _FORBIDDEN = 401, 403

#: Part of the address that the client asks for leave to use Xet storage, which it prefers wherever it can.
_XET_PATH = "/xet-write-token/"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    allow_patched: bool = False,
) -> CommitInfo:
    """Upload a saved model with its tokenizer, card and report, in one commit: a failing upload changes no file there.

    Only what `uploadable_files` lists goes up. The uploaded card and page name the repository; those in the folder
    keep its name. A repository that is not there yet is made first, and stays if the upload fails. Weights of an
    earlier upload that are not overwritten are removed in the same commit, as transformers could load them instead.

    Args:
        folder: Where the model was saved.
        repo_id: Repository, such as `me/name`; made if it does not exist.
        private: Whether only its owners see it; by default as the Hub decides.
        token: Access token; by default the one of the environment variable `HF_TOKEN` or of `hf auth login`.
        commit_message: Title of the commit.
        revision: Branch to commit to, by default the main one.
        allow_patched: Whether a model that is not pruned yet may go up, with its posterior.

    Returns:
        The commit. Its `repo_url` is the address of the repository.

    Raises:
        ValueError: If there is no complete model or something that must not go up, if the repository is public but
            `private` was asked for, or its name is not valid.
        OSError: If the folder does not exist, the Hub cannot be reached, refuses the token or fails.
    """
    files = uploadable_files(folder)
    if not allow_patched:
        _require_pruned(files)
    api = HfApi(library_name="hf_vdneuron")
    with _explained_errors(api, repo_id, token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, token=token).repo_id
        info = api.model_info(repo_id, revision=revision, token=token)
        if private and not info.private:
            raise ValueError(
                f"`{repo_id}` exists and is public, but `private` was asked for: make it private on the Hub, or "
                "choose another name."
            )
        remote = {file.rfilename for file in info.siblings or []}
        stale = sorted(name for name in remote - files.keys() if _matches(name, _DEFAULT_WEIGHT_PATTERNS))
        old = _name_in_card(files)
        contents = {name: _content(name, path, old, repo_id) for name, path in files.items()}
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in contents.items()),
                *(CommitOperationDelete(name, is_folder=False) for name in stale),
            ],
            commit_message=commit_message or "Upload model",
            token=token,
            revision=revision,
        )


def uploadable_files(folder: str | Path) -> dict[str, Path]:
    """List the files of a saved model that may be seen by others.

    These are the weights, configs, code, tokenizer, card, report and figures that this package or transformers
    writes, by name. Checkpoints, pickles, hidden files and all others are left out, whatever they hold.

    Args:
        folder: Where the model was saved.

    Returns:
        Path in the repository -> file.

    Raises:
        ValueError: If the model is incomplete, a listed name is a link or no file, or a text file holds an access
            token or a path of this machine.
        FileNotFoundError: If there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"`{root}` is no folder: expected the one that the model was saved to.")
    files = {name: path for name, path in _candidates(root) if _matches(name, _ALLOWED_PATTERNS)}
    for name, path in files.items():
        if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
            raise ValueError(f"`{name}` in `{root}` is a link or no file: only files are uploaded, replace it by one.")
    _require_complete(root, files)
    for name, path in files.items():
        if path.suffix in _TEXT_SUFFIXES:
            _require_shareable(name, _read(path), root)
    return files


def _candidates(root: Path) -> Iterator[tuple[str, Path]]:
    """List what lies in the folder and in its folder of figures, except what is hidden."""
    figures = root / FIGURES_FOLDER
    for path in sorted([*root.iterdir(), *(figures.iterdir() if figures.is_dir() else [])]):
        if not path.name.startswith("."):
            yield path.relative_to(root).as_posix(), path


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Match a path in a repository; no pattern reaches into folders that it does not name."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _require_complete(root: Path, files: Mapping[str, Path]) -> None:
    """Check that what would arrive can be loaded."""
    lacks = [] if CONFIG_NAME in files else [CONFIG_NAME]
    if not _weights(files):
        lacks.append("weights in `.safetensors` files")
    lacks += sorted(_named_files(files) - files.keys())
    if lacks:
        raise ValueError(
            f"`{root}` has no {' and no '.join(lacks)}: expected a whole model, as `save_pretrained` writes it. Save "
            "it again, or name the folder that holds it."
        )


def _weights(files: Mapping[str, Path]) -> list[Path]:
    return [path for path in files.values() if path.suffix == ".safetensors"]


def _named_files(files: Mapping[str, Path]) -> set[str]:
    """List the files that config and index say they need."""
    names: set[str] = set()
    if SAFE_WEIGHTS_INDEX_NAME in files:
        shards = _read_json(files[SAFE_WEIGHTS_INDEX_NAME]).get("weight_map")
        names |= {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
    if CONFIG_NAME in files and _read_json(files[CONFIG_NAME]).get("vdneuron") is not None:
        code = CODE_FILES[0].name
        needed = get_relative_imports(files[code]) if code in files else []  # none, where an earlier version saved it
        names |= {code, *(f"{name}.py" for name in needed)}
    return names


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path}` is damaged: {error}. Save the model again.") from error
    return content if isinstance(content, dict) else {}


def _require_shareable(name: str, text: str, root: Path) -> None:
    """Refuse a text that holds a secret, without repeating the secret."""
    if _TOKEN.search(text):
        raise ValueError(
            f"`{name}` holds what looks like an access token of the Hub (`hf_...`): nothing was uploaded. Take it "
            "out, and revoke it if others have seen the file."
        )
    for local in (root.resolve(), Path.home()):
        # The root of a file system is in every path, and a word such as `/home` in many addresses.
        if len(local.parts) > 1 and re.search(rf"(?<![\w.~:/-]){re.escape(str(local))}(?![\w.-])", text):
            raise ValueError(
                f"`{name}` names the folder `{local}` of this machine: nothing was uploaded. Take it out, or write "
                "the last part of the path only."
            )


def _require_pruned(files: Mapping[str, Path]) -> None:
    """Refuse a model that still has its posterior: it is larger than the dense one."""
    for path in _weights(files):
        try:
            with safe_open(path, framework="pt") as weights:
                names = list(weights.keys())
        except SafetensorError as error:
            raise ValueError(f"`{path}` is damaged: {error}. Save the model again.") from error
        if any(name.endswith(_VARIATIONAL_SUFFIX) for name in names):
            raise ValueError(
                f"`{path}` holds a model that is not pruned yet, with log-variances of its weights: expected a pruned "
                "one. Call `trainer.prune()` and save it, or set `allow_patched` to push it as it is."
            )


def _content(name: str, path: Path, old: str | None, repo_id: str) -> bytes | Path:
    """Give what is uploaded for a file: what speaks of the folder here speaks of the repository there."""
    if name not in {CARD_NAME, PAGE_NAME} or old is None:
        return path
    text = _CARD_NAME_LINE.sub(lambda line: line[1] + repo_id, path.read_text(encoding="utf-8"), count=1)
    return _renamed(text, old, repo_id).encode()


def _name_in_card(files: Mapping[str, Path]) -> str | None:
    """Read what the card of a folder calls its model."""
    found = _CARD_NAME_LINE.search(_read(files[CARD_NAME])) if CARD_NAME in files else None
    return None if found is None else found[2].strip("'\"")  # YAML quotes names that look like numbers


def _renamed(text: str, old: str, new: str) -> str:
    """Let the lines that load a model, in a card or on a page, load it from elsewhere."""
    for quote, written in (('"', str), ("&#34;", html.escape)):
        text = text.replace(
            f"from_pretrained({quote}{written(old)}{quote}", f"from_pretrained({quote}{written(new)}{quote}"
        )
    return text


@contextmanager
def _explained_errors(api: HfApi, repo_id: str, token: str | None) -> Generator[None]:
    """Say in one line what went wrong at the Hub, and what to do."""
    try:
        yield
    except (HTTPError, RuntimeError, OSError) as error:  # a failed transfer of a file is one of the latter two
        raise OSError(f"cannot push to `{repo_id}`: {_reason(api, _cause(error), token)}") from error


def _cause(error: BaseException) -> BaseException:
    """Find what a failed transfer failed of. An answer of the Hub is its own: its cause says less."""
    return error if isinstance(error, HTTPError) or error.__cause__ is None else error.__cause__


def _reason(api: HfApi, error: BaseException, token: str | None) -> str:
    details = " ".join(str(error).split())
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if _XET_PATH in details and status not in {_UNAUTHORIZED, _FORBIDDEN}:
        return (
            "the Hub did not let the client use Xet storage, and no file was changed there. If it has none, as a 404 "
            f"says, set `HF_HUB_DISABLE_XET=1` ({details})"
        )
    if status in {_UNAUTHORIZED, _FORBIDDEN}:
        if status == _FORBIDDEN:
            reason = "the Hub does not let this access token write there: check the name, or take a token that may"
        elif token is None and get_token() is None:
            reason = "there is no access token: log in with `hf auth login`, or set `HF_TOKEN`"
        else:
            reason = "the Hub refused the access token: log in again with `hf auth login`, or correct `HF_TOKEN`"
        return f"{reason} ({details})"
    if isinstance(error, HTTPError | ConnectionError) and not isinstance(error, HfHubHTTPError):
        reason, advice = f"{api.endpoint} cannot be reached or broke off", "Check the connection and `HF_ENDPOINT`"
    else:
        reason, advice = "the upload failed, and no file was changed there", "Try again"
    return f"{reason}. {advice} ({details})"
