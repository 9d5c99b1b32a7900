"""The art itself: divergences, distillation methods, the Accelerate training loop."""
