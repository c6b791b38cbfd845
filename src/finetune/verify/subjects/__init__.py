"""How the suite reaches a trainer: it is asked by ability, in this process, as a subprocess or by a command."""
