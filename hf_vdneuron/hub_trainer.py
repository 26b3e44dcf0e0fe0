# SPDX-License-Identifier: Apache-2.0
"""A Trainer whose every upload to the Hub goes by the allow-list: no optimizer, no pickle, no checkpoint."""

from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, run_as_future
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_vdneuron.hub import CARD_NAME, push_folder


__all__ = ["HubTrainer"]


class HubTrainer(Trainer):
    """Uploads the model, tokenizer, card and report of a run, and nothing else that lies in its folder."""

    push_in_progress: Any  # the upload in the background, None before the first

    def push_to_hub(  # type: ignore[override]  # the Trainer's returns all of these too, but does not say so
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the model as it is now, and upload it to `args.hub_model_id`.

        A card that is there already is kept, unless there is something to write into a new one.

        Args:
            commit_message: Title of the commit.
            blocking: Whether to return only when it is done.
            token: Access token; by default `args.hub_token`.
            revision: Branch to commit to; by default `args.hub_revision`.
            private: Whether only its owners see the repository; by default `args.hub_private_repo`.
            **kwargs: Passed on to `create_model_card`.

        Returns:
            The commit, or its future if not blocking; None on all processes but the first.

        Raises:
            ValueError: If there is something that must not go up.
            OSError: If the Hub cannot be reached, refuses the token or fails.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if kwargs or not Path(str(self.args.output_dir), CARD_NAME).exists():
            self.create_model_card(**kwargs)
        self._finish_current_push()
        push = self._push_of(self.args.output_dir, commit_message, token=token, revision=revision, private=private)
        return push() if blocking else run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload model and tokenizer of a checkpoint in the background, as the Trainer does with more."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        push = self._push_of(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
        # They wait in one queue: the last one is done when all are.
        self.push_in_progress = PushInProgress(cast(Any, [run_as_future(push)]))

    def _push_of(
        self,
        folder: str | None,
        commit_message: str | None,
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> "partial[CommitInfo]":
        args = self.args
        return partial(
            push_folder,
            str(folder),
            self.hub_model_id or args.hub_model_id or Path(str(args.output_dir)).absolute().name,
            private=args.hub_private_repo if private is None else private,
            token=args.hub_token if token is None else token,
            commit_message=commit_message,
            revision=args.hub_revision if revision is None else revision,
            allow_patched=True,
        )
