"""Shrink a finished language model as far as its loss allows, and go on using it as before.

    python examples/compress_checkpoint.py --model outputs/pretrain_clm

The states are reduced as far as the measured loss on a few batches allows; the loss before and after is measured on
text that played no part in that. `hf-compressm reduce` does the same from the command line.
"""

from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel, set_seed

from common import fail, state_sizes
from hf_compressm import compress
from pretrain_clm import DataArguments, collate, load_sequences


@dataclass
class Arguments:
    """The model, and how much it may lose."""

    model: str = field(default="outputs/pretrain_clm", metadata={"help": "Directory, or name on the Hub."})
    output_dir: str = field(default="outputs/compress_checkpoint", metadata={"help": "Where the smaller model goes."})
    max_loss_increase: float = field(default=0.01, metadata={"help": "What the reduction may cost, nats per token."})
    batch_size: int = field(default=16, metadata={"help": "Sequences per batch."})


@torch.no_grad()
def mean_loss(model: PreTrainedModel, loader: DataLoader) -> float:
    """Loss per token."""
    model.eval()
    return sum(float(model(**batch).loss) for batch in loader) / len(loader)


def main(args: list[str] | None = None) -> None:
    """Load, measure, reduce, measure, save."""
    options, data = HfArgumentParser((Arguments, DataArguments), description=__doc__).parse_args_into_dataclasses(args)
    set_seed(0)
    try:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        train, validation = load_sequences(data, AutoTokenizer.from_pretrained(options.model))
    except (OSError, ValueError) as error:
        fail(error)
    loader = DataLoader(train, options.batch_size, shuffle=True, collate_fn=collate)
    held_out = DataLoader(validation, options.batch_size, collate_fn=collate)
    sizes, parameters, before = state_sizes(model.config), model.num_parameters(), mean_loss(model, held_out)

    report = compress(model, max_loss_increase=options.max_loss_increase, dataloader=loader)

    print(report)
    print(f"states {sizes} → {state_sizes(model.config)}, parameters {parameters:,} → {model.num_parameters():,}")
    print(f"validation loss {before:.4f} → {mean_loss(model, held_out):.4f} nats per token")
    model.save_pretrained(options.output_dir)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output_dir)
    report.save(options.output_dir)
    print(f"saved to {options.output_dir}")


if __name__ == "__main__":
    main()
