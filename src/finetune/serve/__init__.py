"""Puts a result behind Ollama or llama.cpp's server, and checks what is served."""
