"""Byte-level BPE tokenizers as Hugging Face's library trains them."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, trainers


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str] = ("<eos>",)) -> Tokenizer:
    """A tokenizer of `vocab_size` tokens at most, the special ones first; every byte has one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
