"""Load a saved model in a process of its own, and let it continue a text.

    python examples/generate.py --model outputs/pretrain_clm --prompt "KING:"
    python examples/generate.py --model me/my-compressed-ssm                       a name on the Hub

`import hf_compressm` makes the architectures known. Without the package, `trust_remote_code=True` loads the code that
pushes of `CompreSSMCallback`, `hf-compressm card` and `hf-compressm export --to remote_code` put beside the weights.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed

import hf_compressm  # before this import, a new process does not know the architecture
from common import fail, state_sizes


def main() -> None:
    """Read the command line, load, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/pretrain_clm", help="directory, or name on the Hub")
    parser.add_argument("--prompt", default="ROMEO:\n", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except OSError:
        fail(
            f"no model in {args.model}, nor one of this name on the Hub; train one: "
            f"python examples/pretrain_clm.py --output_dir {args.model}"
        )
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
