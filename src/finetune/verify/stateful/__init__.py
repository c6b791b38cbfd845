"""Stories of runs and stores whose processes die at a drawn write: stages, what must hold at each, and who dies how."""
