"""What teachers and tokenizers learn; one file each."""

from teachers.objectives.masked import MaskedObjective
from teachers.objectives.objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {"masked": MaskedObjective}
