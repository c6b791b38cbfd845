"""Writes results for other programs: merged model folders and GGUF, each proved after writing."""
