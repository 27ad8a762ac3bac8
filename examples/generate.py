"""Load a saved model in a process of its own, and let it continue a text."""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed

import hf_compressm  # before this import, a new process does not know the architecture
from common import fail, state_sizes


def main() -> None:
    """Read the command line, load, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="outputs/pretrain_clm", help="directory of the model")
    parser.add_argument("--prompt", default="ROMEO:\n", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not Path(args.model, "config.json").is_file():
        fail(f"no model in {args.model}; train one: python examples/pretrain_clm.py --output_dir {args.model}")

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    print(
        f"hf_compressm {hf_compressm.__version__} loaded {args.model}: {type(model).__name__}, "
        f"state sizes {state_sizes(model.config)}, {model.num_parameters():,} parameters\n"
    )
    set_seed(args.seed)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"do_sample": True, "temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    print(write(args.prompt, **options)[0]["generated_text"])


if __name__ == "__main__":
    main()
