"""The proof of the suite: faults are planted in our own trainer, one at a time, and what is caught is counted."""
