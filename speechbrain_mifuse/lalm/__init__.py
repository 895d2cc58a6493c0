"""Audio language models behind an OpenAI-compatible API: prompts, answers, client, store, collection."""
