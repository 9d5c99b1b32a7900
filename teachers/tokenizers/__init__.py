"""Image tokenizers, and the tokens of a data set on disk."""
