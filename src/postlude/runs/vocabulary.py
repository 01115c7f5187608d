"""Whether two models predict the same words."""

from __future__ import annotations

from postlude.errors import SettingsError
from postlude.runs.checkpoint import Checkpoint

__all__ = ["check_vocabulary"]


def check_vocabulary(checkpoint: Checkpoint, reference: Checkpoint) -> None:
    """Refuse a reference with another vocabulary.

    Raises:
        SettingsError: another number of words, or other words.
    """
    sizes = [
        len(one.model.get_submodule(one.language.head).weight) for one in (checkpoint, reference)
    ]
    if sizes[0] != sizes[1]:
        raise SettingsError(
            f"The reference has a vocabulary of {sizes[1]} words and the model one of {sizes[0]}; they must be the "
            "same. Use the checkpoint that tuning starts from, or another model with the same tokenizer."
        )
    ours, theirs = checkpoint.tokenizer, reference.tokenizer
    if ours is not None and theirs is not None and ours.get_vocab() != theirs.get_vocab():
        raise SettingsError(
            f"The reference's tokenizer has other words than the model's ({len(theirs)} and {len(ours)}), so its "
            "probabilities are of other tokens. Use a reference with the same tokenizer."
        )
