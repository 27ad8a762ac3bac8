"""A tokenizer of bytes that needs no file, and that `AutoTokenizer` reads back from any directory it was saved to."""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every UTF-8 byte is a token whose id is its value; 256 ends a text, 257 pads."""
    # a model without any character in its vocabulary falls back to bytes for all of them
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return for_transformers(tokenizer)


def for_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with the two special tokens, as transformers saves and loads it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )
