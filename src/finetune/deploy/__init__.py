"""Hands a GGUF file to servers, and asks them. Verb: deploy.

`go_template` and `derive` say a chat template in Ollama's language, `modelfile` writes its recipe, `ollama` talks to
its server, and `llama_server` is llama.cpp's own.
"""
