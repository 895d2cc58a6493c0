"""Zero-shot emotion scores: audio against prompts, in one space."""
