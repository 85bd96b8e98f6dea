"""Servers with the OpenAI interface: on transformers and on vLLM."""
