"""What ships to the device: sessions, preprocessing, prompts, pipeline, LLM engines. Never imports torch or transformers."""
