"""Templates and tokens: a conversation as text, as ids, and with the marks of what is trained."""
