# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a language model on a text, remove the heads and neurons that it does not need there, and let it write.

    python scripts/language_model.py --model_name_or_path M --text_file FILE --output_dir OUT --target_speedup 1.5

The last tenth of the text is held out. Printed is the perplexity on it: before, fine-tuned, right after the cut and in
the end. OUT then holds the pruned model and its tokenizer. With `--layout uniform` a Llama, and most models like it,
stays an ordinary checkpoint, which any program loads that knows the dense one.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import hf_vdneuron
from hf_vdneuron.budget import body_cost, cost_ratio
from hf_vdneuron.cli import check_counts, one_line_errors, output_folder, parse_args, print_table
from hf_vdneuron.loading import load_language_model
from hf_vdneuron.trainer import VDTrainer
from hf_vdneuron.training_args import VDTrainingArguments


#: Share of the text, at its end, that is not trained on.
HELD_OUT = 0.1

#: How far a logit may move for rounding alone, relative to the largest one.
CAUSAL_TOLERANCE = 1e-5

#: Tokens of a block: one that is predicted, from one before it.
SHORTEST_BLOCK = 2

Rows = list[dict[str, Tensor]]


@dataclass
class TextArguments:
    """Which model, on which text."""

    model_name_or_path: str = field(metadata={"help": "Causal language model: a folder, or a name on the Hub."})
    text_file: Path = field(metadata={"help": "Text, in UTF-8."})
    block_length: int = field(default=128, metadata={"help": "Tokens of a training example."})
    prompt: str = field(default="The", metadata={"help": "What the pruned model goes on from."})
    max_new_tokens: int = field(default=60, metadata={"help": "How many tokens it then writes."})

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ValueError: If one is below 1, or a block has no token to predict from another.
        """
        check_counts(self, "max_new_tokens")
        if self.block_length < SHORTEST_BLOCK:
            raise ValueError(f"`block_length` is {self.block_length}, expected at least {SHORTEST_BLOCK}")


def read_blocks(text_args: TextArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Rows, Rows]:
    """Cut a text into blocks of tokens.

    Args:
        text_args: Which text.
        tokenizer: Tokenizer of the model.

    Returns:
        Rows to train on, and rows held out.

    Raises:
        ValueError: If the text is not in UTF-8, or too short for one of each.
    """
    try:
        text = text_args.text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`text_file` {text_args.text_file} is no text in UTF-8: convert it first ({error})"
        ) from error
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    num_blocks = len(ids) // text_args.block_length
    blocks = ids[: num_blocks * text_args.block_length].view(num_blocks, text_args.block_length)
    num_held_out = math.ceil(HELD_OUT * num_blocks)
    if not 0 < num_held_out < num_blocks:
        raise ValueError(
            f"`text_file` has {len(ids)} tokens: expected at least two blocks of {text_args.block_length}"
        )
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    return rows[:-num_held_out], rows[-num_held_out:]


@torch.no_grad()
def require_causal(model: PreTrainedModel, row: dict[str, Tensor]) -> None:
    """Refuse a model that sees what it is to predict, as one trained on masked words does.

    Args:
        model: The model.
        row: A row of the text.

    Raises:
        ValueError: If what it predicts depends on later tokens.
    """
    model.eval()
    ids = row["input_ids"].repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % model.config.vocab_size
    one, other = model(input_ids=ids).logits[:, :-1]
    if (one - other).abs().max() > CAUSAL_TOLERANCE * one.abs().max():
        raise ValueError(
            f"`model_name_or_path` holds a {type(model).__name__} that looks ahead: expected a causal language model, "
            "whose predictions do not change with later tokens"
        )


def perplexity(loss: float | None) -> str:
    """Write a mean loss per token as perplexity.

    Args:
        loss: The loss in nats, None if it was not measured.

    Returns:
        A table's cell.
    """
    return "-" if loss is None else f"{math.exp(loss):.2f}"


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text_args: TextArguments) -> str:
    """Let a model go on from a prompt, always with the likeliest token.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text_args: The prompt, and how many tokens it adds.

    Returns:
        Prompt and continuation.
    """
    prompt = tokenizer(text_args.prompt, return_tensors="pt").to(model.device)
    ids = cast(Any, model).generate(**prompt, max_new_tokens=text_args.max_new_tokens, do_sample=False)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def sparsify(
    text_args: TextArguments, args: VDTrainingArguments, folder: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[list[str]]]:
    """Fine-tune, cut, recover and save.

    Args:
        text_args: Which model, on which text.
        args: How to train.
        folder: Where the pruned model goes.

    Returns:
        The pruned model as its user loads it, its tokenizer, and rows of a table about both.
    """
    set_seed(args.seed)
    model, tokenizer = load_language_model(text_args.model_name_or_path)
    train, held_out = read_blocks(text_args, tokenizer)
    require_causal(model, train[0])
    length = text_args.block_length
    dense = body_cost(model, length=length), model.num_parameters()
    trainer = VDTrainer(model=model, args=args, max_length=length, train_dataset=train, eval_dataset=held_out)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    pruned = trainer.prune()
    after = trainer.evaluate()["eval_loss"]
    pruned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    body = body_cost(pruned, length=length)
    table = [
        ["perplexity, pretrained", perplexity(before), ""],
        ["perplexity, fine-tuned", perplexity(trainer.milestone("dense_loss")), ""],
        ["perplexity, right after the cut", "", perplexity(trainer.milestone("cut_loss"))],
        ["perplexity in the end", "", perplexity(after)],
        ["parameters", f"{dense[1]:,}", f"{pruned.num_parameters():,}"],
        ["weights of heads and neurons", f"{dense[0].weights:,}", f"{body.weights:,}"],
        ["their speed-up, counted", "", f"{cost_ratio(dense[0].macs, body.macs):.2f}x"],
    ]
    return hf_vdneuron.from_pretrained(folder), tokenizer, table


@one_line_errors
def main(argv: list[str]) -> None:
    """Run the job.

    Args:
        argv: Arguments without the program's name.
    """
    text_args, args = parse_args((TextArguments, VDTrainingArguments), argv, description=__doc__)
    args.dataloader_pin_memory &= args.device.type != "cpu"  # torch warns that it has nothing to pin for
    with output_folder(args.output_dir) as folder:
        model, tokenizer, table = sparsify(text_args, args, folder)
    print_table(["", "dense", "pruned"], table)
    print(f"\n{write(model, tokenizer, text_args)}")


if __name__ == "__main__":
    main(sys.argv[1:])
