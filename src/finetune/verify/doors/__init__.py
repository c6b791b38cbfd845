"""How the suite asks a trainer anything: a door is asked by ability, and what is behind it may be any process."""
