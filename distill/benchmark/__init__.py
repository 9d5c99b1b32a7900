"""The training step against the order of the authors' loop."""
