"""How a student learns from its teacher; one file a method."""

from distill.methods.dimo import DiMO
from distill.methods.method import Method

METHODS: dict[str, type[Method]] = {"dimo": DiMO}
