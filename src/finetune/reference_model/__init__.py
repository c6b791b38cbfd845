"""The small models that ship with FineTune, and how they are made. Verb: build (`recipe`)."""
