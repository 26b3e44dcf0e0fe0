# SPDX-License-Identifier: Apache-2.0
"""Upload a saved model with its tokenizer, card, report and figures to the Hub.

    python scripts/push_to_hub.py OUT --repo_id me/name --private

Log in first with `hf auth login`, or set HF_TOKEN. Nothing else that lies in OUT goes up: no checkpoints, pickles or
hidden files. It is one commit: a failing upload leaves the files of the repository as they were. HF_ENDPOINT names
another Hub; one that has no Xet storage needs HF_HUB_DISABLE_XET=1 too.
"""

import sys
from dataclasses import dataclass, field

from hf_vdneuron.cli import one_line_errors, parse_args
from hf_vdneuron.hub import push_folder


@dataclass
class PushArguments:
    """Flags of this script."""

    folder: str = field(metadata={"help": "Folder of the saved model; its flag may be left out if it comes first."})
    repo_id: str = field(metadata={"help": "Where to, such as `me/name`; made if it does not exist."})
    private: bool = field(default=False, metadata={"help": "Only the owners of the repository may see it."})
    commit_message: str | None = field(default=None, metadata={"help": "Title of the commit."})
    allow_patched: bool = field(
        default=False, metadata={"help": "Upload a model that is not pruned yet too, with its posterior."}
    )


@one_line_errors
def main(argv: list[str]) -> None:
    """Upload, and print where to."""
    if argv and not argv[0].startswith("-"):
        argv = ["--folder", *argv]
    (args,) = parse_args([PushArguments], argv, description=__doc__)
    commit = push_folder(
        args.folder,
        args.repo_id,
        private=args.private or None,
        commit_message=args.commit_message,
        allow_patched=args.allow_patched,
    )
    print(commit.repo_url)


if __name__ == "__main__":
    main(sys.argv[1:])
