"""The kinds of adapters: which layers they sit on, and their files in PEFT's format."""
