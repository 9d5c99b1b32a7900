"""How a student learns from its teacher; one file a method."""
