"""The networks: tokens, some of them masked, and a condition -> logits of the clean tokens."""
