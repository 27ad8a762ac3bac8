"""A byte-level BPE tokenizer, learned from the text that the model is to learn."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import END_OF_TEXT, PADDING, for_transformers

SMALLEST = 256 + 2  # every byte, so that any text can be written, and the two special tokens


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Merge frequent pairs of tokens within words, from bytes on (Sennrich et al., 2016; Radford et al., 2019).

    Args:
        texts: to learn from; the same texts give the same tokenizer.
        vocab_size: at most; fewer tokens if the texts have no more pairs.

    Raises:
        ValueError: `vocab_size` has no room for the bytes.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"--vocab_size is at least {SMALLEST}, the bytes and two special tokens; found {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return for_transformers(tokenizer)
