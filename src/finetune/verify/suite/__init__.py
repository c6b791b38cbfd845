"""The suite: laws of fine-tuning with their cases, the judge that holds a trainer to them, and what comes of it."""
