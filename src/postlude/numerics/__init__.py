"""Pure tensor mathematics: tensors in, tensors out; no modules, no files, no Hugging Face."""
