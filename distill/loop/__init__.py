"""The Accelerate-driven training loop; it knows no method."""
