"""The laws, each filed under its id's subject; `catalogue.SUBJECTS` says which file holds which subjects."""
